"""Where the repository is, and how a file is written whole. A leaf: imports nothing of the package."""

import os
from pathlib import Path

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
