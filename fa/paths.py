"""Where the repository is. A leaf: imports nothing of the package."""

import os
from pathlib import Path

ROOT: Path = Path(os.environ.get("FA_ROOT") or Path(__file__).parents[1]).expanduser().resolve()
"""The repository's root, the folder above the package: notebooks, tables and figures are found from here, never from
the working folder. For a package that was installed away from its repository, the environment variable ``FA_ROOT``
says where the repository is."""
