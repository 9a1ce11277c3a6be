"""The shape of the package: chapters import downward only, without a cycle; modules and lines stay short;
documentation is whole."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fa

PACKAGE = fa.ROOT / "fa"
LAYERS = [  # from the ground up; a chapter may import itself and whatever stands before it
    {"errors", "paths", "provenance", "citations"},
    {"rules", "plot", "tables"},
    {"layers"},
    {"metrics", "models", "theory"},
    {"probes", "symmetry", "check"},
    {"train"},
    {"experiments"},
    {"results"},
    {"", "library", "__main__", "commands"},  # fa/library.py holds the public names, fa/__init__.py hands them on
]
LEVEL = {chapter: level for level, chapters in enumerate(LAYERS) for chapter in chapters}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the package that a module imports, at its head or inside a function; not for type hints alone."""
    hints = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for n in ast.walk(i)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: imports name the package"
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            }
    return found & known


def arrows() -> dict[str, set[str]]:
    trees = modules()
    return {name: imported(tree, set(trees)) - {name} for name, tree in trees.items()}


def chapter(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def test_every_chapter_has_its_layer():
    assert {chapter(m) for m in modules()} == set(LEVEL)


def test_imports_go_downward():
    wrong = [
        f"{a} -> {b}"
        for a, into in arrows().items()
        for b in into
        if b != "fa" and LEVEL[chapter(b)] > LEVEL[chapter(a)]
    ]
    beside = [
        f"{a} -> {b}"
        for a, into in arrows().items()
        for b in into
        if LEVEL[chapter(a)] == LEVEL[chapter(b)]
        and chapter(a) != chapter(b)
        and {chapter(a), chapter(b)} & {"plot", "models", "theory"}
    ]
    assert not wrong, f"imports upward: {', '.join(wrong)}"
    assert not beside, f"imports of a neighbour that stands alone: {', '.join(beside)}"


def test_no_module_imports_itself_in_a_circle():
    graph, path, done = arrows(), [], set()

    def visit(name: str) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(path.pop())

    for name in graph:
        visit(name)


def test_a_recipe_is_a_leaf_of_the_trainer():
    assert {b for b in arrows()["fa.train.config"] if chapter(b) not in ("errors", "rules")} == set()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_modules_and_lines_are_short(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 320, f"{path.name} has {len(lines)} lines"
    assert not [i for i, line in enumerate(lines, 1) if len(line) > 120], "lines above 120 columns"


def test_the_library_is_an_evenings_read():
    chapters = [*(PACKAGE / "rules").glob("*.py"), *(PACKAGE / "layers").glob("*.py")]
    chapters += [PACKAGE / f"{name}.py" for name in ("metrics", "models", "theory")]
    assert sum(len(p.read_text(encoding="utf-8").splitlines()) for p in chapters) <= 3634


def test_public_names_are_documented():
    undocumented = []
    for name, tree in modules().items():
        for node in tree.body:
            if (
                isinstance(node, (ast.ClassDef, ast.FunctionDef))
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                undocumented.append(f"{name}.{node.name}")
    assert not undocumented
