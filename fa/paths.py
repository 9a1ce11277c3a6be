"""Where things are, and how a file is written and read whole. A leaf: imports nothing of the package but its error."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


_told = os.environ.get("FA_ROOT")
ROOT: Path = Path(os.path.expanduser(os.path.expandvars(_told or Path(__file__).parents[1]))).resolve()
"""The repository's root, the folder above the package: notebooks, tables and figures are found from here, never from
the working folder. For a package that was installed away from its repository, the environment variable ``FA_ROOT``
says where the repository is."""


def is_clone() -> bool:
    """Whether :data:`ROOT` is a clone of the repository: there are claims below it."""
    return (ROOT / "data" / "claims").is_dir()


def home() -> Path:
    """What a user's relative paths are taken from: :data:`ROOT`, or the working folder where that is no clone, so that
    nothing is written beside an installed package."""
    return ROOT if is_clone() else Path.cwd()


def user_folder(variable: str, default: str) -> Path:
    """A folder that a user may move: ``$VARIABLE``, or ``default`` where that is not set or empty.

    A tilde is the home folder, ``$NAME`` another variable, a relative path is taken from :func:`home`.

    Raises:
        UserError: a URL, quotes or blanks around a path (as files of settings have them, which no shell reads), a tilde
            before the name of a user who is not known, or a variable that is not set.
    """
    given = os.environ.get(variable) or default
    if "://" in given or given != given.strip("'\" \t\r\n"):
        raise UserError(f"{variable}={given!r} is no folder's path; give the path alone, no URL, no quotes, no blanks")
    try:
        folder = Path(os.path.expandvars(given)).expanduser()
    except RuntimeError:
        raise UserError(f"{variable}={os.environ[variable]} names the home of a user who is not known here") from None
    if re.search(r"\$[{\w]", given) and "$" in str(folder):
        raise UserError(f"{variable}={os.environ[variable]} names a variable that is not set")
    return home() / folder


def runs_root() -> Path:
    """The run store: ``$FA_RUNS`` (a relative path is taken from :func:`home`) or ``data/runs``."""
    return user_folder("FA_RUNS", "data/runs")


def user_switch(variable: str) -> bool:
    """Whether a user switched something on: ``$VARIABLE`` is 1, and not 0, empty or not set.

    Raises:
        UserError: it has any other value.
    """
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise UserError(f"{variable}={value} is neither 1 (yes) nor 0 (no); set it to one of them, or unset it")
    return value == "1"


def need_repository() -> None:
    """Refuse to work where the package was installed away from its repository, and nobody said where that is.

    Raises:
        UserError: there are no claims below :data:`ROOT`.
    """
    if not is_clone():
        raise UserError(
            f"{ROOT} is no clone of the repository, which holds notebooks, claims and records; set FA_ROOT to the "
            "folder of a clone, or install that clone with pip install -e"
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block an error of the file system is a sentence about ``path``.

    Raises:
        UserError: e.g. no room, no access, or a file where a folder should be.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); make room or give access, and call again"
        ) from error


def write_bytes(path: Path, content: bytes, keep: str = "") -> Path:
    """Write a file whole or not at all: temporary name, sync, rename.

    Args:
        path: its folder is made if missing.
        content: all of it.
        keep: name under which the file that was there before stays, in the same folder (default: it does not stay).

    Raises:
        UserError: it cannot be written; what was there before is there still.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            if keep and path.exists():
                os.replace(path, path.with_name(keep))
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)  # the room that it takes may be what lacks
            raise
    return path


def read_json(path: Path, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """A file's dictionary.

    Args:
        path: the file.
        kinds: entries that it must have, and their types.

    Raises:
        UserError: the file cannot be read, or is not such a dictionary.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); restore it, or remove it") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{path} is damaged: it is no table of {', '.join(kinds)}; restore it, or remove it")
    return found


def read_csv(path: Path, **how: Any) -> pd.DataFrame:
    """A table whose words are never missing: an empty ``layer`` or ``rule`` is "".

    Args:
        path: the file.
        how: for ``pandas.read_csv``, in place of that.

    Raises:
        UserError: the file cannot be read as a table.
    """
    import zlib

    import pandas as pd

    words = ["run", "paper", "figure", "rule", "layer", "metric", "source"]
    old = int(pd.__version__.partition(".")[0]) < 3  # from pandas 3 on numbers are read to the last bit
    exact = {"float_precision": "round_trip"} if old else {}
    try:
        table = pd.read_csv(path, **exact, **(how or {"dtype": dict.fromkeys(words, str)}))
        if how:
            return table
        present = [w for w in words if w in table]
        return table.fillna({w: "" for w in present}).astype({"depth": "Int64"} if "depth" in table else {})
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as a table ({type(error).__name__}); restore it") from error


def relative(path: Path) -> str:
    """A path as a stored text says it, on every machine alike: from the repository's root, where it is below it, else
    the name alone."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def told(path: Path) -> str:
    """A path as a terminal says it: from the repository's root, where it and the working folder are below it, else
    whole."""
    return relative(path) if path.is_relative_to(ROOT) and Path.cwd().is_relative_to(ROOT) else str(path)
