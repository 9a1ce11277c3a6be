"""One environment, written down four times: pyproject.toml, requirements.lock, environment.yml and the one that runs.

Each is held against the others, and the Makefile's refusals are run for real.
"""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fa
from fa.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEEDED = [
    Requirement(r)
    for r in [
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["notebooks"],
        *PROJECT["project"]["optional-dependencies"]["dev"],
    ]
]
LOCK_LINES = (ROOT / "requirements.lock").read_text().splitlines()
PIN = re.compile(r"(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)==(?P<version>[0-9][0-9a-z.]*)(?: ; (?P<marker>.+))?")
TORCH = re.compile(r"torch|torchvision|triton|(?:nvidia|cuda)-.+")  # what TORCH=own leaves to the user
PLATFORMS = [
    {"sys_platform": platform, "python_version": python, "python_full_version": f"{python}.0"}
    for platform in ("linux", "darwin")
    for python in ("3.11", "3.12", "3.13", "3.14")
]


def lock() -> dict[str, tuple[Version, Marker | None]]:
    """requirements.lock as name -> (version, marker); every line must be a pin, and every name stand there once."""
    pins = {}
    for line in LOCK_LINES:
        pin = PIN.fullmatch(line)
        assert pin, f"requirements.lock holds more than pins: {line!r}"
        assert pin["name"] not in pins, f"requirements.lock pins {pin['name']} twice"
        pins[pin["name"]] = Version(pin["version"]), Marker(pin["marker"]) if pin["marker"] else None
    return pins


def on(marker: Marker | None, **platform: str) -> bool:
    """Whether a pin with this marker is installed on that platform; without a platform, on this one."""
    return marker is None or marker.evaluate(platform or None)


def test_lock_is_pins_only() -> None:
    """No index, no find-links, no host, no path, no local build: the lock means the same on every machine."""
    pins = lock()
    assert list(pins) == sorted(pins)
    assert not any(version.local for version, _ in pins.values())


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda r: r.name)
def test_lock_satisfies_pyproject(requirement: Requirement) -> None:
    version, marker = lock()[canonicalize_name(requirement.name)]
    assert version in requirement.specifier
    assert all(on(marker, **platform) for platform in PLATFORMS)


def test_torch_pair() -> None:
    """torchvision is built for exactly one torch; a lock that let either move gives a pair that cannot be imported."""
    pins = lock()
    assert [f"{name}=={pins[name][0]}" for name in ("torch", "torchvision")] == PROJECT["tool"]["uv"][
        "constraint-dependencies"
    ]
    built_for = next(r for r in map(Requirement, metadata.requires("torchvision")) if r.name == "torch")
    assert Version(torch.__version__) in built_for.specifier
    if Version(torchvision.__version__).public == str(pins["torchvision"][0]):
        assert built_for.specifier == Requirement(f"torch=={pins['torch'][0]}").specifier
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]  # its compiled half works


def test_cuda_wheels_are_for_linux() -> None:
    cuda = {
        name: marker
        for name, (_, marker) in lock().items()
        if name == "triton" or name.startswith(("nvidia-", "cuda-"))
    }
    assert len(cuda) > 10
    for name, marker in cuda.items():
        for platform in PLATFORMS:
            assert on(marker, **platform) == (platform["sys_platform"] == "linux"), name


def test_build_backend_is_locked() -> None:
    """The environment installs fa without build isolation, so the backend must come with the lock."""
    for requirement in map(Requirement, PROJECT["build-system"]["requires"]):
        assert lock()[canonicalize_name(requirement.name)][0] in requirement.specifier


def test_conda_takes_python_and_pip_only() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(environment["channels"]) <= {"conda-forge", "nodefaults"}
    *conda, last = environment["dependencies"]
    assert conda == ["python" + PROJECT["project"]["requires-python"], "pip"]
    assert last == {"pip": ["-e .[notebooks,dev]"]}


def test_environment_is_the_lock() -> None:
    """What is installed is what is pinned; an environment that `make env` did not make owes us nothing."""
    stamp = Path(sys.prefix) / ".fa-installed"
    if not stamp.exists():
        pytest.skip("not an environment of `make env`")
    own_torch = stamp.read_text().strip() == "own"
    pins = {
        name: version
        for name, (version, marker) in lock().items()
        if on(marker) and not (own_torch and TORCH.fullmatch(name))
    }
    installed = {canonicalize_name(d.name): Version(d.version) for d in metadata.distributions()}
    wrong = {
        name: (str(version), str(installed.get(name)))
        for name, version in pins.items()
        if installed.get(name) != version
    }
    assert not wrong, f"(pinned, installed): {wrong}; `make env` mends it"
    if stamp.stat().st_mtime < (ROOT / "pyproject.toml").stat().st_mtime:
        pytest.skip("pyproject.toml is newer than this environment; `make env` installs the package anew")
    assert str(installed[PROJECT["project"]["name"]]) == fa.__version__


def test_the_command_line_tells_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"fa {fa.__version__}\n"


def test_the_library_alone_needs_torch_numpy_and_pandas() -> None:
    assert [Requirement(r).name for r in PROJECT["project"]["dependencies"]] == ["torch", "numpy", "pandas"]
    assert (ROOT / "fa" / "py.typed").exists()


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == fa.__version__
    assert [(reference["abbreviation"], reference["doi"]) for reference in citation["references"][:3]] == [
        (f"p{i}", f"10.48550/arXiv.{paper}") for i, paper in enumerate(("1812.06488", "2003.01513", "2405.20594"), 1)
    ]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {citation['version']} ({citation['date-released']})" in changes


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in the repository's root as a user would, whatever the make that runs the tests was told."""
    told = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "VENV", "PYTHON", "TORCH"}
    environment = {name: value for name, value in os.environ.items() if name not in told}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=60)


def test_make_help_names_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    named = re.findall(r"^  make ([a-z-]+) +\S", make("help").stdout, re.MULTILINE)
    assert sorted(named) == sorted(set(phony) - {"always"})


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["PYTHON=no-such-python"], "fa: no Python 3.11 or newer with venv and pip among: no-such-python."),
        (["TORCH=own"], "but they cannot be imported there."),
        (["TORCH=cpu"], "fa: TORCH=cpu is not known;"),
    ],
)
def test_make_env_refuses(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    """One sentence, an exit code, and nothing written."""
    refused = make("env", f"VENV={tmp_path / 'venv'}", *arguments)
    assert refused.returncode != 0
    assert sentence in refused.stderr
    assert len([line for line in refused.stderr.splitlines() if not line.startswith("make")]) == 1
    assert list(tmp_path.iterdir()) == []


STUB = """#!/bin/sh
# A Python that installs nothing: notes what it is asked for, and makes an environment of itself.
echo "$*" >> {log}
case "$*" in
"-m venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && touch "$4/pyvenv.cfg" ;;
*/dev/stdin) cat >> {log} ;;
esac
"""


def test_make_env_makes_anew_what_was_cut_short_and_keeps_ones_own_torch(tmp_path: Path) -> None:
    """The recipe from end to end, with a stub in Python's place."""
    stub, log, venv = tmp_path / "python", tmp_path / "log", tmp_path / "venv"
    stub.write_text(STUB.format(log=log))
    stub.chmod(0o755)

    def asked(*arguments: str) -> str:
        log.write_text("")
        done = make("env", f"VENV={venv}", f"PYTHON={stub}", *arguments)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "venv.installing").exists()
        return log.read_text()

    first = asked()
    assert f"-m venv --clear {venv}" in first and "\ntorch==" in first
    assert (venv / ".fa-installed").read_text() == "lock\n"
    assert "-m pip install" not in asked(), "what is there is not installed again"
    (venv / ".fa-installed").unlink()
    assert "-m venv" not in asked(), "an environment that was found is kept"
    (venv / ".fa-installed").unlink()
    (tmp_path / "venv.installing").touch()
    assert f"-m venv --clear {venv}" in asked(), "one that was cut short is made anew"
    own = asked("TORCH=own")
    assert "\nnumpy==" in own and "\ntorch==" not in own and "\nnvidia-" not in own
    assert (venv / ".fa-installed").read_text() == "own\n"
    assert "-m pip install" not in asked(), "and that is remembered"


def test_make_env_spares_what_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused = make("env", f"VENV={tmp_path}")
    assert refused.returncode != 0 and "is not a Python environment" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
