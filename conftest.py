"""Tests of notebooks: the cells of one belong together, in the order in which they stand."""

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out whole files (``pytest -n 2``): xdist's own default gives the cells of a notebook to whichever process is
    free."""
    from xdist.scheduler import LoadScopeScheduling

    return LoadScopeScheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Run all cells of a notebook, in order, where ``-k``, ``--lf``, ``--ff`` or a plugin chose some of them."""
    seen, whole = set(), []
    for item in session.items:
        if item.path.suffix != ".ipynb":
            whole.append(item)
        elif item.path not in seen:  # the first of a notebook's cells stands for all
            seen.add(item.path)
            whole += item.parent.collect()
    session.items[:] = whole
