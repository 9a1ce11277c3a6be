"""Where the repository is, and how a file is written whole. A leaf: imports nothing of the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

ROOT: Path = Path(os.environ.get("FA_ROOT") or Path(__file__).parents[1]).expanduser().resolve()
"""The repository's root, the folder above the package: notebooks, tables and figures are found from here, never from
the working folder. For a package that was installed away from its repository, the environment variable ``FA_ROOT``
says where the repository is."""


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all: temporary name, sync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    return path


def read_csv(path: Path) -> pd.DataFrame:
    """A table whose words are never missing: an empty ``layer`` or ``rule`` is ""."""
    import pandas as pd

    words = ["run", "paper", "figure", "rule", "layer", "metric", "source"]
    table = pd.read_csv(path, dtype={w: str for w in words})
    present = [w for w in words if w in table]
    return table.fillna({w: "" for w in present}).astype({"depth": "Int64"} if "depth" in table else {})


def relative(path: Path) -> str:
    """A path as one says it: from the repository's root, where it is below it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
