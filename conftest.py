"""Tests of notebooks: the cells of one belong together, in the order in which they stand."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out whole files (``pytest -n 2``): xdist's own default gives the cells of a notebook to whichever process is
    free."""
    from xdist.scheduler import LoadScopeScheduling

    return LoadScopeScheduling(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Run all cells of a notebook, in order, where ``-k``, ``--lf``, ``--ff`` or a plugin chose some of them."""
    before = [item for item in items if item.path.suffix == ".ipynb"]
    yield
    chosen, whole = dict.fromkeys(item.path for item in items if item.path.suffix == ".ipynb"), []
    for item in items:
        if item.path not in chosen:
            whole.append(item)
        elif chosen[item.path] is None:  # the first of a notebook's cells stands for all
            chosen[item.path] = True
            whole += [cell for cell in before if cell.path == item.path]
    items[:] = whole
