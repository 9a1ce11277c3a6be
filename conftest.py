"""Tests in several processes (``pytest -n 2``, with pytest-xdist): a notebook's cells belong to one of them."""

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out whole files: xdist's own default gives the cells of a notebook to whichever process is free."""
    from xdist.scheduler import LoadScopeScheduling

    return LoadScopeScheduling(config, log)
