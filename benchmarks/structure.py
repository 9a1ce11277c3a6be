"""The shape of the package in numbers: lines by chapter, longest module, widest line, import cycles, and the calls of
the package that lie between a page's table and the backward pass.

``python benchmarks/structure.py [FOLDER]`` (default: this repository's ``fa``).
"""

from __future__ import annotations

import ast
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

LIBRARY = ("rules", "layers", "metrics", "models", "theory")  # the evening of a curious reader


def modules(folder: Path) -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def cycles(files: dict[str, Path]) -> int:
    """Number of groups of modules that import one another in a circle, at their heads or in functions."""
    arrows: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        into, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
        hints = [i for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)]
        skipped = {id(node) for hint in hints for node in ast.walk(hint)}  # imports for type hints alone
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in skipped:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1]]) if node.level else ""
                module = ".".join(filter(None, [base, node.module]))
                into |= {m if (m := f"{module}.{a.name}") in files else module for a in node.names}
        arrows[name] = into & set(files) - {name, name.partition(".")[0]}
    reach = {n: set(into) for n, into in arrows.items()}
    for middle in files:
        for n in files:
            if middle in reach[n]:
                reach[n] |= reach[middle]
    return len({frozenset(m for m in files if m in reach[n] and n in reach[m]) for n in files if n in reach[n]})


def calls() -> list[str]:
    """The package's functions on the stack when the first ``backward`` of a page's training is called, from ``table`` on."""
    import torch

    from fa.results.page import Page

    stack: list[str] = []

    def backward(*_: object, **__: object) -> None:
        frame = sys._getframe(1)
        while frame and not stack[-1:] == ["table"]:
            if f"{os.sep}fa{os.sep}" in frame.f_code.co_filename:
                stack.append(frame.f_code.co_name)
            frame = frame.f_back
        raise KeyboardInterrupt

    torch.Tensor.backward = backward  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(FA_RUNS=folder, FA_BUILD=folder, FA_WORKERS="1")
        try:
            Page("p3_fig2", mode="quick", rules=["bp"], seeds=1, device="cpu").table()
        except KeyboardInterrupt:
            pass
    return stack[::-1]


def main() -> None:
    """Print the numbers."""
    own = Path(__file__).resolve().parents[1] / "fa"
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else own
    files, lines = modules(folder), Counter()
    for path in files.values():
        lines[path.relative_to(folder).parts[0].removesuffix(".py")] += len(
            path.read_text(encoding="utf-8").splitlines()
        )
    for chapter, n in lines.most_common():
        print(f"{n:6}  {chapter}")
    print(
        f"{sum(lines.values()):6}  in all; {sum(lines[c] for c in LIBRARY)} of them the library ({', '.join(LIBRARY)})"
    )
    length, longest = max(
        (len(p.read_text(encoding="utf-8").splitlines()), str(p.relative_to(folder))) for p in files.values()
    )
    width = max(len(line) for p in files.values() for line in p.read_text(encoding="utf-8").splitlines())
    print(f"longest module: {longest}, {length} lines; widest line: {width} columns; import cycles: {cycles(files)}")
    if folder == own:
        found = calls()
        print(f"from a page's table to the backward pass: {len(found)} functions ({' > '.join(found)})")


if __name__ == "__main__":
    main()
