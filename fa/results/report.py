"""The report, its details, the README's table, the table of costs and the gallery, made from templates, claims, records
and figures.

The prose is in ``report/``. ``REPORT.in.md`` and ``REPORT_details.in.md`` are jinja2 templates. ``NAME.md`` (optional)
has the finding of figure NAME in its first line and a few sentences after it. Every result comes from a table: a text
asks for a result by its claim, ``{{ ours.p3_fig2_accuracy_pfa }}``. The output depends on committed files alone.
A new figure needs no edit here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from fa import citations, experiments
from fa.errors import UserError
from fa.paths import ROOT, need_repository, read_json, write_bytes
from fa.plot import RULE_STYLE
from fa.results import claims, plan, records
from fa.results.markdown import claims_table, common_start, labelled, markdown
from fa.results.page import Page

VERDICTS = ("holds", "partly", "fails", "not tested")


def render() -> dict[Path, str]:
    """REPORT.md, REPORT_details.md, README.md and docs/costs.md with their tables filled, figures/README.md, as they
    should be on disk.

    Raises:
        UserError: a template, README.md or one of its markers is missing, a template asks for what is not there, or a
            claim is malformed.
    """
    told = _context()
    readme = ROOT / "README.md"
    if not readme.exists():
        raise UserError("README.md is missing; it holds the markers <!-- figures:begin --> and <!-- figures:end -->")
    costs = ROOT / "docs" / "costs.md"
    return {
        ROOT / "REPORT.md": _filled("REPORT.in.md", told),
        ROOT / "REPORT_details.md": _filled("REPORT_details.in.md", told),
        readme: _between(readme, "figures", _readme(told)),
        ROOT / "figures" / "README.md": _gallery(told),
    } | ({costs: _between(costs, "costs", _costs())} if costs.exists() else {})


def write() -> list[Path]:
    """Write what ``render`` returns; returns the paths. Outside a clone of the repository it raises UserError."""
    need_repository()
    rendered = render()
    for path, text in rendered.items():
        write_bytes(path, text.encode())
    return list(rendered)


# ----------------------------------------------------------------------------------------- what the templates are given


def _context() -> dict[str, Any]:
    """What a template can ask for."""
    table = _verdicts()
    told: dict[str, Any] = {
        "n": {"claims": len(table), **_counted(table.verdict)},
        "ours": {r.id: r.ours or r.verdict for r in table.itertuples()},
        "verdict": {name: _verdict(rows.verdict) for name, rows in table.groupby("name")},
        "references": [citations.full(r) for r in citations.citation()["references"]],
        "from_papers": int((~_own(table) & (table.verdict == "holds")).sum()),
        "single_seed": int(((table.n.astype(str) == "1") & (table.verdict == "holds")).sum()),
    }
    told["figures"] = [_figure(name, rows, told) for name, rows in table.groupby("name", sort=False)]
    told["figures"].sort(key=lambda f: f.notebook)
    whole = {f.name: f for f in told["figures"] if not f.why_untested}
    for f in told["figures"]:  # where the larger scale is complete, the report leaves the smaller one to the details
        f.smaller = whole.get(records.name_of(f.name, "small")) if f.name in whole else None
    smaller = [f.smaller for f in told["figures"] if f.smaller]
    told["main"] = [f for f in told["figures"] if not f.waits and f not in smaller]
    told["compute"] = markdown(
        ["figure", "runs", "hours", "hardware"], [[f"`{f.name}`", *f.compute] for f in told["figures"] if f.compute]
    )
    return told


def _verdicts() -> pd.DataFrame:
    """The verdicts with each claim's figure and source, and the measurement as one text with the figure's labels."""
    about = pd.DataFrame([{"id": c.id, "name": c.name, "source": c.source} for c in claims.load()])
    table = claims.verdicts().merge(about, on="id", validate="1:1")
    pairs = [list(zip(m.split("; "), s.split("; "))) if m else [] for m, s in zip(table.measured, table.sd)]
    ours = ["; ".join(m if s == "nan" else f"{m} ± {s}" for m, s in p) for p in pairs]
    of = [experiments.find(records.figure_of(name)[0]) for name in table.name]
    return table.assign(ours=[*map(labelled, ours, of)], why=[*map(labelled, table.why, of)])


def _figure(name: str, rows: pd.DataFrame, told: Mapping[str, Any]) -> SimpleNamespace:
    """One figure's part of the report."""
    about, made = experiments.find(records.figure_of(name)[0]), _made(name)
    finding, text = _prose(name, about.title, told)
    open_ = rows[rows.verdict != "holds"]
    start, shown = common_start(list(open_.claim))
    untested = rows[rows.verdict == "not tested"]
    tested = [str(n) for n in rows.n if str(n)]
    return SimpleNamespace(
        name=name,
        title=about.title,
        paper=about.paper,
        notebook=about.notebook,
        finding=finding,
        text=text,
        picture=(picture := (ROOT / "figures" / f"{name}.png").exists()),
        waits=not picture and (len(untested) == len(rows) or bool(made.get("partial"))),
        verdict=_verdict(rows.verdict),
        why_untested="; ".join(dict.fromkeys(why.partition(" (")[0] for why in untested.why)),
        seeds=" to ".join(dict.fromkeys([min(tested, key=int), max(tested, key=int)])) if tested else "",
        table="" if set(open_.verdict) <= {"not tested"} else claims_table(open_.assign(claim=shown), start),
        so_far=_so_far(name) if made.get("partial") else "",
        claims=_claims(rows),
        settings=_settings(name, made),
        compute=_compute(made),
        environments=[", ".join(f"{k} {v}" for k, v in sorted(e.items()) if v) for e in made.get("environments", [])],
    )


def _prose(name: str, title: str, told: Mapping[str, Any]) -> tuple[str, str]:
    """Finding and sentences of ``report/NAME.md``; the figure's title and nothing where there is no such file."""
    if not (ROOT / "report" / f"{name}.md").exists():
        return title, ""
    first, _, rest = _filled(f"{name}.md", told).partition("\n")
    return first, rest.strip()


# ------------------------------------------------------------------------------------------------------------ claims


def _own(table: pd.DataFrame) -> pd.Series:
    """Whether a claim's target is a prediction or derivation of ours, not a number or statement of a paper."""
    return table.source.str.startswith(("our", "unknown", "third party"))


def _counted(verdicts: pd.Series) -> dict[str, int]:
    return {v: int((verdicts == v).sum()) for v in VERDICTS}


def _verdict(verdicts: pd.Series) -> str:
    """ "25 of 27 hold, 2 partly", or "not tested"."""
    n = _counted(verdicts)
    if n["not tested"] == len(verdicts):
        return f"{len(verdicts)} not tested"
    words = {"partly": "partly", "fails": "fails" if n["fails"] == 1 else "fail", "not tested": "not tested"}
    rest = [f"{n[v]} {word}" for v, word in words.items() if n[v]]
    return ", ".join([f"{n['holds']} of {len(verdicts)} hold", *rest])


def _claims(rows: pd.DataFrame) -> str:
    """Everything about each claim, for the details."""
    columns = ("claim", "target", "tolerance", "source", "ours", "n", "verdict", "why")
    lines = [[f"`{r.id}`", *(getattr(r, c) for c in columns), f"`{r.criterion}`"] for r in rows.itertuples()]
    return markdown(["id", *columns[:3], "source of target", "ours (mean ± sd)", *columns[5:], "criterion"], lines)


# ----------------------------------------------------------------------------------------------------------- records


def _planned(name: str) -> list[Any]:
    """The configurations of the figure's planned runs."""
    return experiments.plan(*records.figure_of(name))


def _made(name: str) -> dict[str, Any]:
    """What made the figure's table (:func:`fa.results.records.union`); empty where no run is recorded."""
    try:
        return records.union(*records.figure_of(name), _planned(name))[1]
    except UserError:
        return {}


def _so_far(name: str) -> str:
    """Of a partial record, whose claims are not judged: accuracies at the end, and the published ones."""
    experiment, scale = records.figure_of(name)
    page = Page(experiment, scale=scale)
    metric = next((m for m in ("val_accuracy", "test_accuracy") if m in set(page.table().metric)), "")
    if not metric:
        return ""
    head = f"Recorded so far ({page.partial()}), {metric.replace('_', ' ')} after the last epoch, in percent:"
    return f"{head}\n\n```\n{page.compare(metric)}\n```"


def _compute(made: Mapping[str, Any]) -> list[str]:
    """Runs, hours and hardware, for the table of computational requirements; nothing without a record."""
    if not made:
        return []
    hardware = dict.fromkeys(e["gpu"] or e["cpu"] for e in made["environments"])
    return [f"{made['finished']} of {made['planned']}", f"{made['wall_seconds'] / 3600:.1f}", ", ".join(hardware)]


def _settings(name: str, made: Mapping[str, Any]) -> str:
    """A sentence with the settings that all rules share, and a table of the others."""
    configs = list(made.get("configs", {}).values()) or [asdict(c) for c in _planned(name)]
    hidden = ["run", "measure", "revision"]
    frame = pd.DataFrame(configs, dtype=object).drop(columns=hidden, errors="ignore")
    n = frame.pop("seed").nunique() if "seed" in frame else 0
    rank = {rule: i for i, rule in enumerate(RULE_STYLE)}
    frame = frame.sort_values("rule", key=lambda c: c.map(rank), kind="stable")
    rules = frame.groupby("rule", sort=False).agg(lambda c: ", ".join(sorted(map(str, c.dropna().unique()))))
    same = [c for c in rules if rules[c].nunique() == 1]
    seeds = f", {n} seed{'s' if n > 1 else ''}" if n else ""
    shared = "; ".join(f"{c} {rules[c].iloc[0]}" for c in same if rules[c].iloc[0])
    told = f"Settings {'as run' if made else 'as planned'}{seeds}: {shared}."
    rest = rules.drop(columns=same).reset_index()
    return told + (f"\n\n{markdown(rest.columns, rest.values)}" if len(rest.columns) > 1 else "")


# -------------------------------------------------------------------------------------------------------------- text


def _readme(told: Mapping[str, Any]) -> str:
    """The README's one table: a row a figure, with the finding of the scale at which all claims are tested, or some."""
    scales: dict[str, list[SimpleNamespace]] = {}
    for f in told["figures"]:
        scales.setdefault(records.figure_of(f.name)[0], []).append(f)
    rows = []
    for both in scales.values():
        f = next((f for f in both if not f.why_untested), next((f for f in both if f.seeds), both[0]))
        other = [f" ({records.figure_of(o.name)[1]} scale: {o.verdict})" for o in both if o is not f]
        rows.append([f"[{f.notebook[:2]}](notebooks/{f.notebook}.ipynb)", f.finding, "".join([f.verdict, *other])])
    return markdown(["notebook", "figure and finding", "claims"], rows)


def _costs() -> str:
    """What every figure takes at the paper's scale, by the records of one kind of machine, as ``fa plan`` tells it."""
    planned = {}
    for name in (name for name, about in experiments.EXPERIMENTS.items() if about.grid):
        runs = experiments.plan(name, "paper")
        planned[name] = list({c.run: c for run in runs for c in (*getattr(run, "needs", ()), run)}.values())
    found, _ = plan.forecasts(planned, "epyc", 2)
    rows = []
    for name, forecast in found.items():
        steps, known = sum(map(plan.steps, forecast.todo)), len(forecast.known)
        row = [f"`{name}`", f"{steps:,}" if steps else "not counted", f"{known} of {len(forecast.todo)}"]
        rows.append([*row, *(plan.in_words(forecast) if known else ("not measured", ""))])
    return markdown(["figure", "steps of all runs", "known runs", "core-hours of these", "on two cores"], rows)


def _gallery(told: Mapping[str, Any]) -> str:
    """Every committed figure with a short line; its caption on demand."""
    blocks = [
        "# Figures\n\n<!-- made by `python -m fa report` -->\n\nEach as PNG and PDF, with its provenance as JSON."
    ]
    trails = {p.stem: read_json(p, caption=str) for p in (ROOT / "figures").glob("*.json")}
    for name, trail in sorted(trails.items(), key=lambda item: (item[1].get("notebook", ""), item[0])):
        finding, _ = _prose(name, trail["caption"].partition(". ")[0], told)
        links = [f"[PDF]({name}.pdf)", f"[provenance]({name}.json)"]
        if trail.get("notebook"):
            links.append(f"[notebook](../notebooks/{Path(trail['notebook']).name})")
        blocks.append(
            f"## {name}\n\n{finding} ({', '.join(links)}).\n\n[![{name}]({name}.png)]({name}.pdf)\n\n"
            f"<details><summary>Caption</summary>\n\n{trail['caption']}\n\n</details>"
        )
    return "\n\n".join(blocks) + "\n"


def _filled(template: str, told: Mapping[str, Any]) -> str:
    """A file of ``report/`` with its placeholders filled."""
    import jinja2

    loader = jinja2.FileSystemLoader(ROOT / "report")
    env = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # noqa: S701 (Markdown, not HTML)
    try:
        return env.get_template(template).render(told)
    except jinja2.TemplateError as error:
        raise UserError(f"report/{template}: {error}") from None


def _between(path: Path, block: str, content: str) -> str:
    """The text of a file with what stands between the block's markers replaced."""
    text, begin, end = path.read_text(encoding="utf-8"), f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise UserError(f"{path.name} needs {begin} and, after it, {end}, once each")
    return text[: text.index(begin) + len(begin)] + f"\n{content}\n" + text[text.index(end) :]
