"""Table 1 measured: its plan, the twin that stores R, the symmetry of matrices, and that cells and claims say the
same."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import fa
from fa import experiments, plot, symmetry
from fa.experiments import p3_table1
from fa.layers.feedback import generator
from fa.metrics import linear_layers
from fa.results import claims, records
from fa.train import measure
from fa.train.config import Config
from fa.train.loop import Run, train, train_runs


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


# ------------------------------------------------------------------------------------------------------------ plan


@pytest.mark.parametrize("mode", ["quick", "paper"])
def test_every_run_of_the_plan_is_one_run(mode):
    runs = experiments.plan("p3_table1", mode)
    assert len({c.run for c in runs}) == len(runs), "a probe and a training run must not share an identity"
    figure2 = {c.run for c in experiments.plan("p3_fig2", mode, rules="bp,fa,usf,kp")}
    shared = {c.run for c in runs if c.rule in p3_table1.SHARED and not c.measure}
    assert shared <= figure2
    assert mode == "quick" or shared == figure2
    for rule in p3_table1.RULES:
        trained = "" if rule in p3_table1.SHARED else "symmetry"
        assert {c.measure for c in runs if c.rule == rule} == {"interventions", trained}


def test_the_mirror_goes_to_the_weight():
    options = p3_table1.WM
    assert options["amp"] == pytest.approx(2 * options["decay"]) and options["input"] == "normal"


# ------------------------------------------------------------------------------------------------------- measuring


def trained(rule: str, seeds: int, epochs: int) -> Config:
    (config,) = [c for c in p3_table1.grid("quick", (rule,), seeds, epochs, "") if c.measure == "symmetry"]
    return config


@pytest.mark.parametrize("rule", ["pfa", "pfa_o"])
def test_the_twin_stores_the_r_that_was_left_out(rule):
    """Against a network that was trained with R stored: same recipe, same seed."""
    config = trained(rule, 1, 3)
    assert config.rule_options["implicit"]
    nets = {}
    for name, c in {"implicit": config, "explicit": config.vary(implicit=None)}.items():
        train_runs([run := Run(c)])
        nets[name] = run.net
    twin = measure.explicit(config, nets["implicit"])
    for name, layer in linear_layers(twin).items():
        want = linear_layers(nets["explicit"])[name].feedback.R.double()
        assert torch.linalg.vector_norm(layer.feedback.R - want) < 1e-4 * torch.linalg.vector_norm(want)
        torch.testing.assert_close(
            fa.feedback_weight(layer).float(),
            fa.feedback_weight(linear_layers(nets["implicit"])[name]),
            rtol=1e-4,
            atol=1e-5,
        )
    assert measure.explicit(config.vary(rule="kp", options=""), nets["explicit"]) is nets["explicit"]


def test_rows_of_symmetry_stand_beside_the_trainers():
    config = trained("pfa", 1, 2)
    table = train(config)
    rows = table[table.metric.str.match("[BR]_")]
    assert set(rows.epoch) == {0, 2} and set(rows.layer) == {"fc1", "fc2", "fc"}
    assert set(rows.metric) == {f"{m}_{n}" for m in "BR" for n in ("match", "mixed", "chance", "excess")}, (
        "no correlation across shapes"
    )
    wide = rows.pivot_table(index=["epoch", "layer"], columns="metric", values="value")
    np.testing.assert_allclose(wide.R_excess, wide.R_match - wide.R_mixed)
    assert (
        (wide.R_match.loc[0] - wide.R_chance.loc[0]).abs().max()
        < 0.1
        < (wide.R_match.loc[2] - wide.R_chance.loc[2]).min()
    )
    plain = train(config.vary(measure=""))
    pd.testing.assert_frame_equal(
        table[~table.index.isin(rows.index)].reset_index(drop=True), plain
    )  # measuring changes nothing


def test_a_probe_asks_every_layer():
    table = train(p3_table1.PROBE.vary(rule="sa", epochs=1))
    wide = table.pivot_table(index="layer", columns="metric", values="value")
    assert set(table.epoch) == {1} and table.attrs["status"]["state"] == "finished"
    layers = wide.loc[["fc1", "fc2", "fc"]]
    assert (layers.send_sign == 0).all() and (layers.learn_sign > 0.5).all() and (layers.B_reciprocal == 1).all()
    assert wide.loc[""].noise_passes == 0
    assert "test_accuracy" not in set(table.metric), "its accuracies on digits are not the figure's"


# -------------------------------------------------------------------------------------------------------- symmetry


def layer(rule: str, W: torch.Tensor, **options) -> nn.Linear:
    linear = nn.Linear(W.shape[1], W.shape[0]).double()
    with torch.no_grad():
        linear.weight.copy_(W)
    return fa.convert(linear, rule, **options)


def wide_matrix(seed: int = 0) -> torch.Tensor:
    return torch.randn(40, 60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_symmetry_against_numpy():
    W = wide_matrix()
    (row,) = symmetry.symmetry(layer("fa", W)).itertuples()
    net = layer("fa", W)
    B = net.feedback.B.numpy()
    assert row.matrix == "B" and row.correlation == pytest.approx(
        np.corrcoef(B.ravel(), W.numpy().ravel())[0, 1], abs=1e-12
    )
    cosines = (B / np.linalg.norm(B, axis=1, keepdims=True)) @ (
        W.numpy() / np.linalg.norm(W.numpy(), axis=1, keepdims=True)
    ).T
    assert row.match == pytest.approx(np.abs(cosines).max(1).mean(), abs=1e-12)
    assert row.match == pytest.approx(row.chance, abs=0.05), "a random matrix matches as a random matrix does"


def test_symmetry_tells_a_copy_a_mixture_and_a_stranger():
    W = wide_matrix()
    copy = layer("kp", W)
    shuffled = layer("kp", W)
    product = layer("pfa", W)
    with torch.no_grad():
        copy.feedback.B.copy_(W + 0.1 * wide_matrix(1))
        shuffled.feedback.B.copy_(-2 * W[torch.randperm(40, generator=generator(0, "test"))])
        product.feedback.R.copy_(product.feedback.B.T @ W)
    (row,) = symmetry.symmetry(copy).itertuples()
    assert row.correlation > 0.98 and row.angle_deg < 10 and row.match > 0.98 > row.mixed + 0.4
    (row,) = symmetry.symmetry(shuffled).itertuples()  # mirrors W under other names: no correlation, and yet a match
    assert abs(row.correlation) < 0.1 and row.match == pytest.approx(1)
    rows = symmetry.symmetry(product).set_index("matrix")
    assert rows.correlation.isna().all() and rows.angle_deg.isna().all()
    assert rows.match["R"] == pytest.approx(rows.mixed["R"], abs=0.05) and rows.match["R"] > rows.chance["R"] + 0.05
    assert rows.match["B"] == pytest.approx(rows.chance["B"], abs=0.03)


def test_symmetry_of_the_other_kinds_of_feedback():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)).double()
    for rule, options, matrices in [("usf", {}, {"K"}), ("pfa", {}, {"B", "R"}), ("dfa", {}, {"B"}), ("kp", {"density": 0.5}, {"B"}),
                                    ("pfa", {"density": 0.5}, {"B", "R"})]:  # fmt: skip
        table = symmetry.symmetry(fa.convert(net, rule, **options))
        assert set(table.matrix) == matrices and table.depth.tolist() == sorted(table.depth)
        assert table.match.notna().all() and table.match.between(0, 1).all(), rule
    masked = symmetry.matrices(net[0])["R"]
    assert 0.3 < (masked == 0).double().mean() < 0.7, "a synapse that does not exist counts as 0"
    fa.convert(net, "usf")
    assert symmetry.symmetry(net).angle_deg.to_numpy() == pytest.approx(fa.alignment(net).angle_deg.to_numpy())
    assert symmetry.symmetry(fa.convert(net, "bp")).empty
    grouped = fa.convert(nn.Conv2d(4, 6, 3, groups=2).double(), "pfa")
    rows = symmetry.symmetry(grouped).set_index("matrix")
    assert np.isnan(rows.match["B"]) and rows.match["R"] > 0, "a matrix between groups shares neither side of W"
    with pytest.raises(fa.UserError, match="implicit=False"):
        symmetry.symmetry(fa.convert(net, "pfa", implicit=True))


# ------------------------------------------------------------------------------------------------- cells and claims


def perfect() -> pd.DataFrame:
    """A record, three seeds, in which every tick of the paper is met."""
    rows = []
    sent = {"bp": (1.2, 0.7), "usf": (1.3, 0.0)}
    angles = {"fa": 85, "usf": 31, "kp": 1, "wm": 5, "pfa": 20, "pfa_o": 5}
    gap = {"bp": 0, "fa": -0.2, "dfa": -0.3, "usf": -0.15, "kp": 0.01, "wm": -0.02, "pfa": 0, "pfa_o": 0.02}
    stored = {"bp": "W", "usf": "K", "pfa": "BR", "pfa_o": "BR"}
    for rule in p3_table1.RULES:
        for seed in range(3):

            def add(epoch, layer, depth, **values):
                rows.extend(
                    [f"{rule}{seed}{epoch}", rule, seed, epoch, layer, depth, metric, value]
                    for metric, value in values.items()
                )  # noqa: B023

            add(10, "", None, noise_passes=0.5 if rule == "wm" else 0.0)
            add(40, "", None, test_accuracy=98.3 + 0.01 * seed + gap[rule])
            for depth, name in enumerate(("fc1", "fc2", "fc"), 1):
                sign, magnitude = sent.get(rule, (0.0, 0.0))
                add(10, name, depth, send_sign=sign, send_magnitude=magnitude)
                if rule in ("kp", "wm", "pfa", "pfa_o"):
                    add(10, name, depth, learn_sign=0.0, learn_magnitude=0.0)
                for matrix in stored.get(rule, "B"):
                    joined = rule not in ("pfa", "pfa_o") and (rule != "dfa" or name == "fc")
                    add(10, name, depth, **{f"{matrix}_reciprocal": float(joined)})
                    if rule in ("dfa", "wm", "pfa", "pfa_o"):
                        close = rule == "wm"
                        values = {
                            "match": 0.99 if close else 0.4,
                            "mixed": 0.4,
                            "chance": 0.1,
                            "excess": 0.59 if close else 0.0,
                        }
                        add(40, name, depth, **{f"{matrix}_{n}": v for n, v in values.items()})
                    if rule == "wm" or rule == "dfa" and name == "fc":
                        add(40, name, depth, B_correlation=0.99 if close else 0.5, B_angle_deg=8 if close else 60)
                if rule in angles:
                    add(40, name, depth, angle_deg=angles[rule])
                if rule != "bp":
                    add(
                        40,
                        name,
                        depth,
                        grad_angle_global_deg=20.0,
                        delta_angle_global_deg=50.0 if rule == "dfa" else 20.0,
                    )
    return pd.DataFrame(rows, columns=records.COLUMNS)


def page(table: pd.DataFrame, reference: pd.DataFrame) -> SimpleNamespace:
    """What the figure asks of its page."""
    return SimpleNamespace(table=lambda: table, reference=lambda: reference)


@pytest.fixture(scope="module")
def ticks() -> pd.DataFrame:
    return records.reference("p3_table1")


@pytest.fixture(scope="module")
def plan() -> list[dict]:
    return [asdict(c) for c in experiments.plan("p3_table1", "paper")]


def verdicts(table: pd.DataFrame, ticks: pd.DataFrame) -> dict[str, str]:
    mine = [c for c in claims.load() if c.name == "p3_table1"]
    return {c.id.removeprefix("p3_table1_"): claims.judge(c, table, ticks)["verdict"] for c in mine}


def test_the_papers_table_is_whole(ticks):
    wide = ticks.pivot(index="metric", columns="rule", values="value")
    assert set(wide.index) == set(p3_table1.PROPERTIES) and set(wide) == {
        "bp",
        "fa",
        "dfa",
        "usf",
        "kp",
        "wm",
        "pal",
        "pfa",
    }
    assert wide.notna().all(axis=None)
    lettered = ticks[ticks.value == 0.5]
    assert set(lettered.source.str.partition("note ")[2].str[0]) == {"a", "b", "c"} and len(lettered) == 7


def test_a_record_that_meets_every_tick_agrees_and_every_claim_holds(ticks):
    cells = p3_table1.cells(perfect(), ticks)
    assert len(cells) == 48 and not (cells.verdict == "disagrees").any()
    assert (cells.verdict == "agrees").sum() == 37  # 42 with PFA in the paper's table, less five footnotes
    assert set(cells[cells.verdict == "not comparable"].rule) == {"fa", "dfa", "usf", "pfa_o"}
    assert set(verdicts(perfect(), ticks).values()) == {"holds"}


@pytest.mark.parametrize("metric, rule, value, prop, claim", [
    ("send_sign", "kp", 0.2, "no_sign_transport", "sign_free"),
    ("learn_sign", "pfa", 0.2, "no_sign_transport", "sign_free"),
    ("send_sign", "usf", 0.01, "no_sign_transport", "sign_read"),
    ("send_magnitude", "dfa", 0.2, "no_magnitude_transport", "magnitude_free"),
    ("learn_magnitude", "wm", 0.2, "no_magnitude_transport", "magnitude_free"),
    ("send_magnitude", "bp", 0.01, "no_magnitude_transport", "magnitude_read"),
    ("noise_passes", "wm", 0.0, "no_separate_phase", "phase_wm"),
    ("noise_passes", "pfa", 0.1, "no_separate_phase", "phase_none"),
    ("R_excess", "pfa", 0.1, "no_explicit_symmetry", "symmetry_pfa"),
    ("angle_deg", "kp", 89.0, "no_explicit_symmetry", "symmetry_kp_wm"),
    ("angle_deg", "pfa", 31.0, "accurate_path", "path"),
    ("angle_deg", "fa", 29.0, "accurate_path", "path_off"),
    ("delta_angle_global_deg", "dfa", 29.0, "accurate_path", "path_off"),
    ("test_accuracy", "wm", 98.0, "bp_level", "level"),
    ("test_accuracy", "fa", 98.3, "bp_level", "below"),
])  # fmt: skip
def test_cells_and_claims_turn_together(metric, rule, value, prop, claim, ticks):
    """One number past its limit: that cell disagrees with the paper, no cell of another rule does, and the claim no
    longer holds."""
    table = perfect()
    table.loc[(table.metric == metric) & (table.rule == rule), "value"] = value
    cells = p3_table1.cells(table, ticks)
    wrong = cells[cells.verdict == "disagrees"]
    assert prop in set(wrong.property) and set(wrong.rule) == {rule}
    assert verdicts(table, ticks)[claim] in ("partly", "fails")


def test_a_reciprocal_synapse_in_product_feedback_fails_its_claim(ticks):
    table = perfect()
    table.loc[(table.metric == "R_reciprocal") & (table.rule == "pfa"), "value"] = 0.1
    assert verdicts(table, ticks)["symmetry_pfa"] == "fails"


def test_a_partial_record_shows_what_it_has(ticks):
    table = perfect()
    cells = p3_table1.cells(table[table.rule.isin(["bp", "pfa"])], ticks)
    empty = cells[~cells.rule.isin(["bp", "pfa"])]
    assert (empty.ours == "").all() and empty.met.isna().all() and (empty.verdict == "not comparable").all()
    nothing = p3_table1.cells(table.iloc[:0], ticks)
    assert (nothing.verdict == "not comparable").all() and set(nothing.rule) == set(p3_table1.RULES) - {"pfa_o"}
    assert set(p3_table1.cells(table[table.rule == "pfa"], ticks.iloc[:0]).rule) == {"pfa"}, (
        "a reader's choice of rules"
    )
    assert p3_table1.mirrors(page(table.iloc[:0], ticks)) == "no run yet"
    assert p3_table1.evidence(page(table.iloc[:0], ticks)) == "no run yet"


def test_a_record_is_held_against_its_own_plan(plan):
    """Both kinds of runs are in the plan, so that a whole record is not refused for a setting."""
    record, planned = claims._sources("p3_table1", "record")
    assert set(record.sidecar["configs"]) == set(planned.run) == set(record.table.run) and len(planned) == len(plan)


def test_texts(ticks):
    table = perfect()
    table.loc[(table.metric == "angle_deg") & (table.rule == "pfa"), "value"] = 31.0
    shown = page(table, ticks)
    lines = {line.split()[0]: line for line in p3_table1.listing(shown).splitlines()[1:]}
    assert "31° · 20° n/y*" in lines["PFA"] and lines["PFA"].count("*") == 1 and "100% · 1.00 n/n" in lines["BP"]
    assert "-0.20 · 0.00 n/n" in lines["FA"] and "n/b" in lines["FA"]
    assert "WM" in p3_table1.mirrors(shown) and "0.99" in p3_table1.mirrors(shown)
    assert "test_accuracy, n = 3; claims level, below" in p3_table1.evidence(shown)


def test_the_figure_is_legible_and_shows_every_cell(ticks):
    table = perfect()
    table.loc[(table.metric == "angle_deg") & (table.rule == "pfa"), "value"] = 31.0
    with plot.style():
        fig = p3_table1.draw(page(table, ticks))
        fig.canvas.draw()
    (ax,) = fig.axes
    assert fig.get_size_inches()[0] == plot.WIDTH["double"]
    for text in ax.texts:
        box = text.get_window_extent()
        assert text.get_fontsize() >= 6.5 and fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1, text.get_text()
    texts = [t.get_text() for t in ax.texts]
    assert (
        texts.count("✓") == (ticks[ticks.rule != "pal"].value == 1).sum()
        and texts.count("✗") == (ticks[ticks.rule != "pal"].value == 0).sum()
    )
    assert [texts.count(letter) for letter in "abc"] == [1, 3, 1] and "31°\n20°" in texts
    framed = [p for p in ax.patches if p.get_edgecolor()[3] > 0]
    assert len(framed) == 1, "the one cell that disagrees"
