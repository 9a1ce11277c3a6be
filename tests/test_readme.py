"""The README's code does what the README says."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fa
from fa.train import data


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"```{language}\n(.+?)```", (fa.ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_loop_trains_and_aligns(capsys: pytest.CaptureFixture[str]) -> None:
    """As printed, given a network and a loader of digits."""
    torch.manual_seed(0)
    digits = data.load("digits").train
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    loader = DataLoader(TensorDataset(digits.x, digits.y), 64, shuffle=True)
    with torch.no_grad():
        before = nn.functional.cross_entropy(net(digits.x), digits.y).item()
    exec(blocks("python")[0], names := {"net": net, "loader": loader})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses, angles = [float(p[1]) for p in printed], [float(p[2]) for p in printed]
    assert names["net"] is net and len(printed) == 10
    assert losses[-1] < 0.1 < losses[0] < before, "the loss falls"
    assert angles[0] < 45 and angles[-1] < 22, "the path aligns"
    with torch.no_grad():
        assert nn.functional.cross_entropy(net(digits.x), digits.y) < 0.1


def test_a_rule_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fa.RULES, "mine", None)  # goes again after the test
    exec(blocks("python")[1], {})
    layer = nn.Linear(3, 2)
    assert torch.equal(fa.feedback_weight(fa.convert(layer, "mine")), layer.weight.abs().mean() * layer.weight.sign())


def test_every_rule_is_in_the_table_with_its_label() -> None:
    from fa.plot import RULE_STYLE

    text = (fa.ROOT / "README.md").read_text(encoding="utf-8")
    listed = {
        name: label
        for names, labels in re.findall(r"^\| (`.+?`) \| (.+?) \|", text, re.MULTILINE)
        for name, label in zip(re.findall(r"`(\w+)`", names), labels.split(", "))
    }
    assert listed == {name: RULE_STYLE[name].label for name in fa.RULES if name != "primitives"}


def test_links_lead_somewhere() -> None:
    pages = ("README.md", "CONTRIBUTING.md", "REPORT.md", "REPORT_details.md", "docs/design.md", "docs/guarantees.md",
             "docs/cluster.md", "docs/costs.md")  # fmt: skip
    for name in (*pages, *(f"{folder}/README.md" for folder in ("benchmarks", "data", "figures"))):
        page = fa.ROOT / name
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{name}: {link}"
