"""Figure 5: its grid is the paper's, photographs are trained on from disk, stopped and resumed, and the stand-in is
what it says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fa import experiments, models, theory
from fa.experiments import p3_fig5
from fa.metrics import linear_layers
from fa.results import records
from fa.results.store import RunFolder
from fa.train import data
from fa.train import loop as train


def test_the_grid_is_the_authors() -> None:
    runs = experiments.plan("p3_fig5", "paper")
    assert [(c.rule, c.seed) for c in runs] == [(r, 0) for r in p3_fig5.RULES]
    for c in runs:
        assert (c.dataset, c.model, c.batch, c.epochs, c.augment, c.momentum) == (
            "imagenet",
            "resnet18",
            256,
            75,
            True,
            0.9,
        )
        assert c.schedule(0) == {"lr": 0.1, "weight_decay": 5e-4 if c.rule in ("pfa", "pfa_o") else 1e-4}
        assert [c.schedule(e)["lr"] for e in (19, 20, 39, 40, 59, 60)] == pytest.approx(
            [0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4]
        )
        assert {c.schedule(e)["weight_decay"] for e in range(1, 75)} == {1e-4}


def left(config: train.Config, steps: int) -> list[float]:
    """Share of the mismatch after each epoch of the recipe, by theory."""
    schedule = [tuple(config.schedule(epoch)[t] for t in ("lr", "weight_decay")) for epoch in range(config.epochs)]
    return theory.mismatch_left(schedule, config.momentum, steps)[1:].tolist()


def test_the_stand_in_decays_as_the_paper_does_in_the_first_epoch() -> None:
    (paper,), (small,) = (experiments.plan("p3_fig5", mode, rules="pfa_o") for mode in ("paper", "small"))
    full, ours = left(paper, 1281167 // 256), left(small, 2000 // small.batch)
    assert full[0] == pytest.approx(0.0813, abs=1e-4) and full[4] == pytest.approx(0.011, abs=1e-3)
    assert ours[0] == pytest.approx(full[0], abs=0.015)


def test_targets_of_the_mismatch_are_those_of_the_recurrence() -> None:
    from fa.results import claims

    targets = {
        c.id: float(c.target) for c in claims.load() if "mismatch" in c.id and c.name.startswith(("p3_fig4", "p3_fig5"))
    }
    steps = {
        "p3_fig4": 45000 // 128,
        "p3_fig4_small": 45000 // 128,
        "p3_fig5": 1281167 // 256,
        "p3_fig5_small": 2000 // 25,
    }
    expected = {}
    for name, n in steps.items():
        after = left(experiments.plan(*records.figure_of(name), rules="pfa_o")[0], n)
        expected |= {f"{name}_mismatch_epoch1": after[0], f"{name}_mismatch_end": after[-1]}
    assert len(targets) == 7
    assert targets == pytest.approx({k: expected[k] for k in targets}, rel=2e-4)


def test_quick_mode_is_of_digits_unless_photographs_are_named() -> None:
    assert {(c.dataset, c.model) for c in experiments.plan("p3_fig5", "quick")} == {("digits", "resnet8")}
    named = experiments.plan("p3_fig5", "quick", dataset="tiny-imagenet-20")
    assert {(c.dataset, c.model, c.epochs) for c in named} == {("tiny-imagenet-20", "resnet18", 2)}


def test_fingerprint_needs_no_photographs(monkeypatch) -> None:
    monkeypatch.setenv("FA_DATA", "/nowhere")
    (c,) = experiments.plan("p3_fig5", "small", rules="pfa_o")
    first = train.fingerprint(c, 2)
    assert first == train.fingerprint(c, 2) != train.fingerprint(replace(c, first_weight_decay=0.0), 2)


def test_published_values() -> None:
    t = records.reference("p3_fig5")
    accuracy = t[t.metric == "val_accuracy"].pivot(index="epoch", columns="rule", values="value")
    assert len(accuracy) == 14 and accuracy.loc[75, ["bp", "usf", "pfa"]].tolist() == [69.69, 64.6, 68.46]
    assert accuracy.pfa_o.drop(75).notna().all() and np.isnan(accuracy.pfa_o[75])  # its curve stops
    pytest.importorskip("torchvision")
    assert set(t.layer) - {""} <= set(linear_layers(models.build("resnet18", (3, 224, 224), 1000)))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """24 photographs of two classes, one light and one dark, and a run on them of three epochs under pfa."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    rng = np.random.default_rng(0)
    for split, n in (("train", 8), ("val", 4)):
        for i, c in enumerate(("dark", "light")):
            (tmp_path / "photos" / split / c).mkdir(parents=True)
            for j in range(n):
                image.fromarray(rng.integers(120 * i, 120 * i + 100, (20, 20, 3), np.uint8)).save(
                    tmp_path / "photos" / split / c / f"{j}.JPEG"
                )
    monkeypatch.setitem(
        data.SETS, "photos", data.ImageFolderSource("24", 2, "photos", {"train": 16, "val": 8}, size=16)
    )
    monkeypatch.setenv("FA_DATA", str(tmp_path))
    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs"))
    return train.Config(
        "pfa",
        0,
        "init=xavier implicit=true",
        "photos",
        model="resnet8",
        hidden="",
        epochs=3,
        batch=4,
        lr=0.05,
        augment=True,
    )


def test_training_from_disk_learns_and_resumes_to_the_bit(photos, monkeypatch) -> None:
    """Stopped after the first epoch and resumed, it is the run that was never stopped; there is no test split."""
    whole = train.train(photos)
    assert {"train_loss", "val_accuracy", "angle_deg", "grad_angle_global_deg"} <= set(
        whole.metric
    ) and "test_accuracy" not in set(whole.metric)
    assert whole[(whole.metric == "val_accuracy") & (whole.epoch == 3)].value.item() >= 75  # light from dark
    folder, clock = RunFolder(photos), itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        assert train.train(photos, folder=folder, until=4) is None
    assert folder.checkpoint()["epoch"] == 1
    assert train.train(photos, folder=folder).equals(whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_arrive_there(photos) -> None:
    sets = data.load("photos", "cuda")
    assert sets.train.workers > 0
    (x, y), (x_cpu, y_cpu) = (
        next(data.load("photos", d).train.feed(torch.arange(16).view(4, 4), 0, 1, True)) for d in ("cuda", "cpu")
    )
    assert x.is_cuda and y.is_cuda and torch.allclose(x.cpu(), x_cpu, atol=1e-6) and torch.equal(y.cpu(), y_cpu)
    assert len(train.train(photos, "cuda")) > 0
