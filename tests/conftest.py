"""What tests share: property tests that draw the same examples each time, figures that need no screen, and the site."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from hypothesis import settings

import fa

matplotlib.use("Agg")

# A failure must fail again, on every machine: no random draws, no clock, no memory of earlier runs.
# `pytest --hypothesis-profile=explore` looks further afield.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("explore", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    pytest.importorskip("furo", reason="make site installs Sphinx")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-qW", "--keep-going", "-c", "docs", "-d", str(folder / "doctrees")]
    done = subprocess.run([*command, ".", str(folder / "site")], cwd=fa.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"
