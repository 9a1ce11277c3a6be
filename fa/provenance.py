"""The software and the machine that a run was trained with, for the trail from a figure back to its making. A leaf."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from fa.paths import ROOT


@cache
def environment() -> dict[str, str]:
    """The software and the machine, for provenance; as they were when first asked, before a long run."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "torch": str(torch.__version__),  # a class of its own, which a checkpoint may not hold
        "cuda": torch.version.cuda or "" if gpu else "",
        "gpu": gpu,
        "cpu": _cpu(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
    }


def memory() -> float:
    """Bytes of this machine's memory, or as many as the process, its container or its job may have; infinite where
    nobody says."""
    limits = [math.inf, *control_groups()]
    try:
        import resource

        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        limits += [limit] if limit != resource.RLIM_INFINITY else []
    except (ImportError, AttributeError, ValueError, OSError):
        pass
    return min(limits)


def control_groups(root: Path = Path("/")) -> list[int]:
    """Limits of memory, in bytes, of Linux's control groups that this process is in: a container's, a Slurm job's.

    Args:
        root: of the file system.
    """
    limits = []
    try:
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            old = "memory" in kinds.split(",")  # the first version has a tree for each kind, the second one for all
            if not old and kinds:
                continue
            tree, name = ("memory", "memory.limit_in_bytes") if old else ("", "memory.max")
            top = root / "sys/fs/cgroup" / tree
            for folder in (own := top / path.lstrip("/"), *own.parents):
                if folder.is_relative_to(top) and (file := folder / name).is_file():
                    limits += [int(text)] if (text := file.read_text().strip()).isdigit() else []
    except (OSError, ValueError):
        pass
    return limits


@cache
def software() -> dict[str, str]:
    """What must be alike on machines that train the runs of one campaign, name -> version: the code of this package, as
    it was when first asked, and torch, whatever device it was built for."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return {"fa of code": digest.hexdigest()[:12], "torch": torch.__version__.partition("+")[0]}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit() -> str:
    """``$FA_COMMIT``, or the repository's commit, with "+" where tracked files differ from it; "" outside a
    repository."""
    if told := os.environ.get("FA_COMMIT"):  # for a copy of the files without their history
        return told

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fa")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def told(environments: Sequence[Mapping[str, str]], *keys: str) -> str:
    """The entries of some environments under ``keys`` as a text, each combination once."""
    versioned = ("torch", "cuda")
    lines = [", ".join(f"{k} {e[k]}" if k in versioned else e[k] for k in keys if e.get(k)) for e in environments]
    return "; ".join(dict.fromkeys(lines))
