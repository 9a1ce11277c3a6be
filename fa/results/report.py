"""The report and the README's generated blocks, from claims, records, sidecars, published values and figures.

``REPORT.md`` follows the order of a ReScience C article (template of the ML Reproducibility Challenge). Every result in
it comes from a table; the prose below says what a table cannot. The text depends on committed files alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from fa import experiments
from fa.errors import UserError
from fa.paths import ROOT
from fa.results import claims, criteria, records
from fa.results.page import Notebook

PAPERS = {
    "p1": "T. H. Moskovitz, A. Litwin-Kumar, L. F. Abbott (2018). Feedback alignment in deep convolutional networks. "
          "arXiv:1812.06488.",
    "p2": "D. Kunin, A. Nayebi, J. Sagastuy-Brena, S. Ganguli, J. M. Bloom, D. L. K. Yamins (2020). Two Routes to "
          "Scalable Credit Assignment without Weight Symmetry. ICML. arXiv:2003.01513.",
    "p3": "Li Ji-An, M. K. Benna (2024). Deep Learning without Weight Symmetry. arXiv:2405.20594. "
          "Authors' code: github.com/jil095/product_feedback_alignment, commit d1d413b; Table 1: that of version 1 (PMC11160852).",
}  # fmt: skip
RULES = (
    "FA: T. P. Lillicrap, D. Cownden, D. B. Tweed, C. J. Akerman (2016). Random synaptic feedback weights support "
    "error backpropagation for deep learning. Nature Communications 7, 13276.",
    "DFA: A. Nøkland (2016). Direct feedback alignment provides learning in deep neural networks. NeurIPS.",
    "SF: Q. Liao, J. Z. Leibo, T. Poggio (2016). How important is weight symmetry in backpropagation? AAAI.",
    "KP: J. F. Kolen, J. B. Pollack (1994). Backpropagation without weight transport. ICNN.",
)

REPORT = """\
# [Re] Learning without weight symmetry

<!-- made by `python -m fa report`; edit fa/report.py or data/claims/ instead -->

## Reproducibility summary

**Scope of reproducibility.** {scope} Every claim has a criterion that a program evaluates, written before the runs that it asks for
were made. Exceptions: Table 1, the sparse-feedback figure and notebook 37 also judge runs that Figure 2 had recorded before; and some sources of
targets say otherwise (section 2).

**Methodology.** Independent implementation in PyTorch; the authors' released code was read for its facts and none of
it is used. Networks, data and hyperparameters of Figures 2 to 4 and of the sparse-feedback figure are p3's, precision excepted (section 5.3); KP
and WM, the stand-in for ImageNet, and what lies beyond the paper are ours. Most was trained on two CPU cores, the rest on a GPU (section 3.5).

**Results.** {counts}

**What was easy.** The recipe of p3 is complete in the authors' configuration files.

**What was difficult.** The published numbers had to be read out of released figure PDFs, and not every one could be.

**Communication with original authors.** None.

## 1 Introduction

Backpropagation carries errors down through the transpose of the forward weights, so that every feedback connection
would have to know the strength of a forward one. Feedback alignment (FA) replaces that transpose by a fixed random
matrix, direct feedback alignment (DFA) sends the output error to every layer, sign feedback (SF) keeps only the
signs. Product feedback alignment (PFA) sends the error through an expanded population: a fixed random matrix B, then
a learned matrix R whose local update, together with weight decay, makes the product align with the forward weights
although neither factor does. PFA-o is its case of an orthogonal B without expansion. This report says which of the
published findings come back when they are implemented anew, and which do not. Tables and criteria call rules as the code does: SF
is `usf`, PFA-o `pfa_o`.

## 2 Scope of reproducibility

A claim *holds* when what is measured lies in the interval of its criterion. It holds *partly* when it misses it by
less than one standard deviation over seeds, or for some of the layers or rules only; else it *fails*. It is *not
tested* without a complete record of the paper's data set and recipe with as many seeds as the claim asks for.
`data/claims/` has the criteria, `fa/results/criteria.py` their grammar.

{claims}

## 3 Methodology

### 3.1 Model descriptions

p3's MNIST network is 784-512-512-10 with ReLU and biases (layers `fc1`, `fc2`, `fc`), Xavier-uniform weights and zero
biases under every rule, backpropagation included. Every layer carries its rule's feedback, the output layer too.
Figure 3 trains nothing: W (100 x 256) and B are drawn, and R = B^T W is the solution that training converges to.
p3's CIFAR-10 network is the ResNet of 20 layers with shortcuts without parameters (`conv1`, `layer1.0.conv1` to `fc`);
its ImageNet network is torchvision's ResNet-18. Table 1's interventions are made on small networks trained on digits:
what a rule's code reads does not depend on the data.

### 3.2 Datasets

MNIST: 60,000 training and 10,000 test images, pixels normalised with mean 0.1307 and standard deviation 0.3081, no
augmentation. As in p3 there is no validation set: test accuracy is followed over the epochs. Nothing is selected by it except in the
sparse-feedback figure and one claim of Figure 2, which, as p3 does, take each run's best epoch, an optimistic number. CIFAR-10: 45,000 training images, mirrored and cropped at random, 5,000 for validation, held out as the authors
do, and the 10,000 test images; what p3's figure calls test accuracy is that of the validation images, and we report
both. ImageNet is not at hand; its stand-in, where a figure shows one, is named as such.

### 3.3 Hyperparameters

p3's own for BP, FA, DFA, SF, PFA and PFA-o in Figures 2 and 4 and under sparse feedback; KP has PFA's schedule. Those of WM, of the
stand-in and of what lies beyond the paper are ours. None was searched for. {hyperparameters}

### 3.4 Experimental setup and code

Each figure is an experiment: `python -m fa run EXPERIMENT --mode paper` trains its runs, `python -m fa collect
EXPERIMENT` writes its table to `data/records/`, its notebook draws it, `python -m fa report` writes this report.
Epoch 0 is the untrained network and epoch e the state after e epochs, so that p3's accuracy at its epoch e is ours at
e + 1. Angles are between the forward weights and the effective feedback (for PFA the path, the product of B and R),
norm ratios are of the latter to the former. Values are mean ± standard deviation over seeds (ddof 1); differences
between rules are taken seed by seed where the criterion says `paired`.

### 3.5 Computational requirements

Seconds are wall time of one process; what runs shared that were trained at once is divided equally among them. "+" after a
commit: files had changed since.

{compute}

## 4 Results

{counts}

{results}

## 5 Discussion

{discussion}

### 5.1 What was easy

p3's configuration files give every hyperparameter, and Figure 3 needs no training. The linear algebra gives exact
targets: the share of the initial mismatch between R and B^T W that is left after any epoch follows from the schedule
alone.

### 5.2 What was difficult

The body text of p3 was not at hand: its numbers are from the authors' code, the vector graphics of the released
figures and the published table. Published angles and norm ratios are those of one seed. Figure 3 was not released as
a file; its values were recomputed with the authors' recipe, so that agreement there checks two implementations and
not the plot. PFA's strong first epoch of weight decay is in the configuration files and decisive for the angles.

### 5.3 Departures from the papers

* Random streams are our own. One seed gives the same forward weights and the same order of batches under every rule,
  so that rules can be compared seed by seed; in the authors' code the rules consume one stream and so start from
  different weights.
* Test accuracy is evaluated in float32; the authors evaluate under float16 autocast.
* Figure 4 is trained in bfloat16 under autocast (and with it notebook 38), where the authors train in float32. On MNIST that changes nothing that five seeds can
  show; on CIFAR-10 the one seed of SF that was trained in both ended 0.9 points lower, outside its criterion (notebook 40).
* KP under p3's recipe, WM's coefficients, the stand-in's recipe and the swept decays and expansions are ours.
* Angles and norm ratios are measured on every seed and in float64; the authors' figure shows seed 0.
* The standard deviation of Figure 3's eigenvalues is taken within each repeat and averaged; the authors pool the
  repeats.

### 5.4 Communication with original authors

The authors were not contacted.

### 5.5 Conclusion

On MNIST p3's account holds: PFA and PFA-o learn as well as backpropagation, their paths align as the recurrence of the weight
decay says, and neither of PFA's matrices mirrors W. What differs is small: FA's seeds scatter more than published, and PFA's
output layer ends nearer to W. Beyond the paper, PFA-o breaks down where feedback is sparse, PFA and KP do not, and the strong decay of the
first epoch costs PFA accuracy that four epochs do not win back. CIFAR-10 rests on one seed a rule so far and is not judged; ImageNet was
not trained.

## References

{references}
"""


def render() -> dict[Path, str]:
    """REPORT.md, and README.md with its marked blocks filled, as they should stand on disk.

    Raises:
        UserError: README.md or one of its markers is missing, or a claim is malformed.
    """
    table = _claims_table()
    readme = ROOT / "README.md"
    if not readme.exists():
        raise UserError("README.md is missing; it holds the markers <!-- claims:begin --> and <!-- gallery:begin -->")
    text = _fill(readme.read_text(encoding="utf-8"), "claims", _readme_claims(table))
    return {ROOT / "REPORT.md": _report(table), readme: _fill(text, "gallery", _gallery())}


def write() -> list[Path]:
    """Writes what ``render`` returns; returns the paths."""
    rendered = render()
    for path, text in rendered.items():
        path.write_text(text, encoding="utf-8", newline="\n")
    return list(rendered)


def _claims_table() -> pd.DataFrame:
    """The verdicts with each claim's paper, figure, experiment and source, and the measurement as one text."""
    told = pd.DataFrame(
        [{k: getattr(c, k) for k in ("id", "paper", "figure", "experiment", "source")} for c in claims.load()]
    )
    table = claims.verdicts().merge(told, on="id", validate="1:1")
    pairs = [list(zip(m.split("; "), s.split("; "))) if m else [] for m, s in zip(table.measured, table.sd)]
    return table.assign(ours=["; ".join(m if s == "nan" else f"{m} ± {s}" for m, s in p) for p in pairs])


def _report(table: pd.DataFrame) -> str:
    names = list(dict.fromkeys(table.experiment))
    papers = list(dict.fromkeys(table.paper))
    scope = ". ".join(
        f"{p if p in PAPERS else 'Across the papers'}: {'; '.join(dict.fromkeys(table.figure[table.paper == p]))}"
        for p in papers
    )
    return REPORT.format(
        scope=f"{len(table)} claims are stated. {scope} (references at the end).",
        counts=_counts(table),
        claims="\n\n".join(
            f"**{title}**\n\n"
            + _markdown(
                rows,
                {
                    "claim": "claim",
                    "target": "target",
                    "tolerance": "tolerance",
                    "source": "source of target",
                    "id": "id",
                },
            )
            for title, rows in _by_figure(table)
        ),
        hyperparameters="\n\n".join(["", *map(_hyperparameters, names)]).strip(),
        compute="\n".join(f"* {_compute(name)}" for name in names),
        results="\n\n".join(
            f"### 4.{i} {title}\n\n{_figure(rows.experiment.iloc[0])}{_so_far(rows.experiment.iloc[0])}"
            + _results(rows)
            for i, (title, rows) in enumerate(_by_figure(table), 1)
        ),
        discussion=_discussion(table),
        references="\n".join(f"* {line}" for line in [*(f"{p}: {PAPERS[p]}" for p in papers if p in PAPERS), *RULES]),
    )


# ------------------------------------------------------------------------------------------------------------- pieces


def _by_figure(table: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    for name, rows in table.groupby("experiment", sort=False):
        known = experiments.EXPERIMENTS.get(name)
        paper = rows.paper.iloc[0]
        where = f" of {paper}" if paper in PAPERS else ", across the papers"
        yield f"{rows.figure.iloc[0]}{where}" + (f": {known.title}" if known else ""), rows


def _counts(table: pd.DataFrame) -> str:
    """How many claims hold, partly hold, fail and are not tested; whose those are that hold, and how many rest on one run a rule."""
    n = table.verdict.value_counts().reindex(criteria.VERDICTS, fill_value=0)
    counted = (
        f"Of {len(table)} claims, {n['holds']} hold, {n['partly']} hold partly, {n['fails']} fail and "
        f"{n['not tested']} are not tested."
    )
    held = table[table.verdict == "holds"]
    own = held.source.str.startswith(("our", "unknown", "third party"))
    if not len(held):
        return counted
    return (
        f"{counted} Of those that hold, {(~own).sum()} are from the papers and {own.sum()} are predictions or derivations of ours; "
        f"{(held.n.astype(str) == '1').sum()} rest on one run a rule."
    )


def _results(rows: pd.DataFrame) -> str:
    """The verdicts of one experiment, then the criteria as they were fixed."""
    shown = rows.assign(verdict=rows.verdict.where(rows.verdict != "not tested", "not tested: " + rows.why))
    criteria = "\n".join(f"* `{r.id}`: `{r.criterion}`" for r in rows.itertuples())
    columns = {
        "claim": "claim",
        "target": "target",
        "tolerance": "tolerance",
        "ours": "ours (mean ± sd)",
        "n": "n",
        "verdict": "verdict",
    }
    return f"{_markdown(shown, columns)}\n\nCriteria:\n\n{criteria}"


def _discussion(table: pd.DataFrame) -> str:
    """What did not hold, one line each; or that nothing failed."""
    missed = table[table.verdict.isin(["partly", "fails"])]
    lines = [f"* {row.verdict}: {row.claim} — {row.why}." for row in missed.itertuples()]
    if lines:
        return "What does not hold, or only partly:\n\n" + "\n".join(lines)
    tested = (table.verdict != "not tested").sum()
    return f"Every one of the {tested} claims tested holds." if tested else "No claim is tested yet."


def _sidecar(experiment: str) -> dict:
    """What stands beside the record; empty where there is none."""
    try:
        return records.sidecar(experiment)
    except UserError:
        return {}


def _compute(experiment: str) -> str:
    """One sentence: how many runs, how long, and every machine, software and commit that made them."""
    beside = _sidecar(experiment)
    if not beside:
        return f"`{experiment}`: no record yet."
    made = "; ".join(", ".join(f"{k} {v}" for k, v in sorted(e.items()) if v) for e in beside["environments"])
    return f"`{experiment}`: {beside['finished']} of {beside['planned']} runs, {beside['wall_seconds']:.0f} s in all ({made})."


def _hyperparameters(experiment: str) -> str:
    """A table of what differs between the rules, and a sentence with what does not."""
    beside = _sidecar(experiment).get("configs", {})
    try:
        configs = list(beside.values()) or [asdict(c) for c in experiments.plan(experiment, "paper")]
    except UserError:
        return f"`{experiment}`: no plan yet."
    untold = ["experiment", "run", "measure", "revision"]
    frame = pd.DataFrame(configs, dtype=object).drop(columns=untold, errors="ignore")
    n = frame.pop("seed").nunique() if "seed" in frame else 0
    seeds = f", {n} seed{'s' if n > 1 else ''}" if n else ""
    rules = frame.groupby("rule", sort=False).agg(lambda c: ", ".join(map(str, c.dropna().unique())))
    same = [c for c in rules if rules[c].nunique() == 1]
    common = "; ".join(f"{c} {rules[c].iloc[0]}" for c in same if rules[c].iloc[0])
    told = f"`{experiment}` ({'as run' if beside else 'as planned'}{seeds}): {common}."
    rest = rules.drop(columns=same).reset_index()
    return told + (f"\n\n{_markdown(rest, {c: c for c in rest})}" if len(rest.columns) > 1 else "")


def _figures() -> list[tuple[str, dict]]:
    """Name and trail of every committed figure."""
    return [(p.stem, json.loads(p.read_text(encoding="utf-8"))) for p in sorted((ROOT / "figures").glob("*.json"))]


def _figure(experiment: str) -> str:
    """The experiment's figure with its caption, or nothing where none is drawn."""
    return "".join(
        f"![{name}](figures/{name}.png)\n\n*{trail['caption']}*\n\n" for name, trail in _figures() if name == experiment
    )


def _so_far(experiment: str) -> str:
    """Of a partial record, whose claims are not judged: accuracies at the end beside the published ones."""
    if not _sidecar(experiment).get("partial"):
        return ""
    page = Notebook(experiment)
    shown = [m for m in ("val_accuracy", "test_accuracy") if m in set(page.table().metric)]
    tables = "\n\n".join(f"{metric}\n{page.compare(metric)}" for metric in shown)
    return f"Recorded so far ({page.partial()}); after the last epoch, in percent:\n\n```\n{tables}\n```\n\n"


def _gallery() -> str:
    """Every committed figure with its caption, PDF and notebook."""
    blocks = []
    for name, trail in _figures():
        notebook = f", [notebook](notebooks/{Path(trail['notebook']).stem}.ipynb)" if trail.get("notebook") else ""
        blocks.append(
            f"[![{name}](figures/{name}.png)](figures/{name}.pdf)\n\n"
            f"**{name}** ([PDF](figures/{name}.pdf){notebook}). {trail['caption']}"
        )
    return "\n\n".join(blocks) or "No figure yet: none has a record."


def _readme_claims(table: pd.DataFrame) -> str:
    """The verdicts counted figure by figure, and in words what does not hold."""
    rows = []
    for title, claimed in _by_figure(table):
        known = experiments.EXPERIMENTS.get(claimed.experiment.iloc[0])
        page = f"[{known.notebook[:2]}](notebooks/{known.notebook}.ipynb)" if known else ""
        n = claimed.verdict.value_counts().reindex(criteria.VERDICTS, fill_value=0)
        why = "; ".join(dict.fromkeys(text.partition(" (")[0] for text in claimed.why[claimed.verdict == "not tested"]))
        rows.append([page, title, len(claimed), *n[:-1], f"{n['not tested']} ({why})" if n["not tested"] else 0])
    columns = ["notebook", "figure", "claims", *criteria.VERDICTS]
    counted = _markdown(pd.DataFrame(rows, columns=columns), {c: c for c in columns})
    return f"{_counts(table)} Every claim, its criterion and its source: [REPORT.md](REPORT.md).\n\n{counted}\n\n{_discussion(table)}"


def _markdown(frame: pd.DataFrame, columns: dict[str, str]) -> str:
    """A Markdown table of these columns under these heads."""

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    rows = frame[list(columns)].itertuples(index=False)
    return "\n".join([line(columns.values()), line("---" for _ in columns), *map(line, rows)])


def _fill(text: str, block: str, content: str) -> str:
    """The text with what stands between the block's markers replaced."""
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise UserError(f"README.md needs {begin} and, after it, {end}, once each")
    return text[: text.index(begin) + len(begin)] + f"\n{content}\n" + text[text.index(end) :]
