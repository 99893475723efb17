"""A study's rows as Markdown tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from studies.catalogue import DEFAULT, PRA, Study, shown
from studies.costs import relative
from studies.groups import Group, groups
from studies.ladder import EQUAL_SECONDS
from studies.measures import Row
from studies.names import in_ranges, name_of
from studies.pairs import Paired, paired, unchanged
from studies.report_probe import probe_table

VARIED = {
    "token-dimension": "numbers per token",
    "noise": "t_min or sigma",
    "length": "steps",
    "ablation": "PRA, but",
    "recipe": "rung",
}
"""Heading of a study's column ``value``."""

LESS = "less PRA's, same seeds"
"""Heading of the differences to PRA in tables of PRA's variants."""
VARIANTS = ("ablation", "recipe", "pareto")

COMPARED = ("systems", "systems-plus", "token-dimension", "length")
"""Studies in which systems stand beside PRA at the same value."""


def tables(study: Study, rows: list[Row]) -> list[str]:
    """Return the tables of one setting and scale."""
    if study.name == "rollout-gap":
        return _gap_table(rows)
    if study.name == "solver":
        return _solver_table(rows)
    if study.name == "pareto":
        return _pareto_table(groups(rows))
    if study.name == "probe":
        return _markdown(*probe_table(rows))
    of = sorted(groups(rows), key=lambda group: group.fid)
    if study.name == "recipe":
        return _quality_table(study, [group for group in of if not is_timed(group)], of)
    return [*_quality_table(study, of), *(_pairs_table(study, of) if study.name in COMPARED else [])]


def is_timed(group: Group) -> bool:
    """Whether the group was trained for as many seconds as faithful PRA, not for as many steps."""
    return str(group.value).endswith(EQUAL_SECONDS)


def _quality_table(study: Study, of: list[Group], timed: Sequence[Group] = ()) -> list[str]:
    """Every system at its best guidance, the best first; ``timed`` has those of equal seconds among its groups."""
    varied = VARIED.get(study.name, "value")
    beside = _beside_pra(of)
    seconds = {str(group.value).removesuffix(EQUAL_SECONDS): group for group in timed if is_timed(group)}
    costs = {id(group): relative(study.name, group) for group in of}
    columns: dict[str, Callable[[Group], str]] = {
        "system": lambda group: name_of(group.system),
        varied: lambda group: shown(group.value),
        "FID": lambda group: _with_spread(group.best, ".3f"),
        "FID, equal seconds": lambda group: (
            _with_spread(found.best, ".3f") if (found := seconds.get(group.value)) else "-"
        ),
        LESS: lambda group: beside.get(str(group.value), "-"),
        "guidance": lambda group: f"{group.guidance:g}",
        "accuracy": lambda group: _number(group.mean("accuracy", group.guidance), ".3f"),
        "KID": lambda group: _number(group.mean("kid", group.guidance), ".4f"),
        "precision": lambda group: _number(group.mean("precision", group.guidance), ".3f"),
        "recall": lambda group: _number(group.mean("recall", group.guidance), ".3f"),
        "seams": lambda group: _number(group.mean("seams", group.guidance), ".2f"),
        "seeds": lambda group: (
            in_ranges(group.by_seed) + (f" ({len(group.judges)} judges)" if group.judges[1:] else "")
        ),
        "reconstruction FID": lambda group: _number(group.mean("reconstruction_fid"), ".3f"),
        "reconstruction seams": lambda group: _number(group.mean("reconstruction_seams"), ".2f"),
        "parameters": lambda group: f"{group.rows[0]['parameters']:,}",
        "training FLOPs": lambda group: f"{cost.training:.2f}" if (cost := costs[id(group)]) else "-",
        "sampling FLOPs": lambda group: f"{cost.sampling:.2f}" if (cost := costs[id(group)]) else "-",
    }
    if all(group.value in ("", None) for group in of):
        del columns[varied]
    if study.name != "recipe":
        for name in ("FID, equal seconds", "seams", "reconstruction seams"):
            del columns[name]
    del columns["system" if study.name in VARIANTS else LESS]
    return [
        *_markdown(list(columns), [[cell(group) for cell in columns.values()] for group in of]),
        "",
        "The guidance is the best by the mean FID over the seeds, and the figures are those at it. FLOPs are of one "
        "image, trained on or sampled at that guidance, as a multiple of PRA's with guidance in this setting.",
    ]


def _beside_pra(of: Sequence[Group]) -> dict[str, str]:
    """FID of each variant less PRA's of the same seeds."""
    reference = unchanged(of)
    if reference is None:
        return {}
    return {str(pair.group.value): _difference(pair) for pair in paired(of, reference)}


def _pairs_table(study: Study, of: Sequence[Group]) -> list[str]:
    """Every system less PRA at the same value; none where PRA has no seed in common with any."""
    lines = []
    for reference in sorted((group for group in of if group.system == PRA), key=lambda group: group.value or 0):
        same = [group for group in of if group.value == reference.value]
        for pair in sorted(paired(same, reference), key=lambda pair: pair.mean):
            value = [] if reference.value in ("", None) else [shown(reference.value)]
            seeds = in_ranges(pair.differences)
            cells = [_difference(pair), str(len(pair.differences)), seeds, _p(pair.p)]
            lines += [[name_of(pair.group.system), *value, *cells]] if pair.differences else []
    if not lines:
        return []
    varied = [VARIED.get(study.name, "value")] if len(lines[0]) > 5 else []
    return [
        "",
        *_markdown(["system", *varied, "FID less PRA's", "n", "seeds", "p"], lines),
        "",
        "Seed by seed, each system at its own best guidance: runs of one seed share the order of the data and the "
        "noise of sampling, so they are paired. ± is the sample standard deviation of the n differences, p that of a "
        "two-sided paired t-test, for each line by itself.",
    ]


def _gap_table(rows: list[Row]) -> list[str]:
    head = ["system", "condition gap, last quarter", "input gap, last quarter", "flow loss on rollouts"]
    head += ["rollouts / training", "FID, guidance 1", "seeds"]
    lines = []
    for system in dict.fromkeys(row["system"] for row in rows):
        seeds = [_gap_of(own) for own in _by_seed(row for row in rows if row["system"] == system).values()]
        cells = [
            _with_spread([value for seed in seeds if (value := seed[place]) is not None], form)
            for place, form in enumerate((".4f", ".4f", ".3f", ".3f", ".3f"))
        ]
        whose = in_ranges(row["seed"] for row in rows if row["system"] == system)
        lines.append((statistics.mean(seed[0] or 0.0 for seed in seeds), [name_of(system), *cells, whose]))
    note = [
        "",
        "A gap is the energy coefficient between sampling and training, 0 where they are distributed alike. Losses are "
        "means over all positions; they compare only systems that generate the same states.",
    ]
    return _markdown(head, [line for _, line in sorted(lines)]) + note


def _gap_of(rows: list[Row]) -> list[float | None]:
    """The figures of one seed."""
    late = [row for row in rows if row["position"] >= 3 * row["tokens"] // 4]
    gaps = [_mean(late, name) for name in ("condition_gap", "input_gap")]
    loss, before = _mean(rows, "rollout_loss"), _mean(rows, "training_loss")
    return [*gaps, loss, loss / before if loss is not None and before else None, _mean(rows, "fid")]


def _mean(rows: Iterable[Row], column: str) -> float | None:
    values = [row[column] for row in rows if column in row]
    return statistics.mean(values) if values else None


def _by_seed(rows: Iterable[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(row)
    return found


def _solver_table(rows: list[Row]) -> list[str]:
    evaluations = sorted({row["evaluations"] for row in rows})
    lines = []
    for system, solver in dict.fromkeys((row["system"], row["solver"]) for row in rows):
        own = [row for row in rows if (row["system"], row["solver"]) == (system, solver)]
        fids = [[row["fid"] for row in own if row["evaluations"] == count] for count in evaluations]
        cells = [_with_spread(each, ".3f") if each else "" for each in fids]
        lines.append([name_of(system), solver, *cells, in_ranges(row["seed"] for row in own)])
    guidances = " or ".join(f"{guidance:g}" for guidance in sorted({row["guidance"] for row in rows}))
    note = ["", f"FID by the number of the head's evaluations per token, at guidance {guidances}."]
    return _markdown(["system", "solver, grid of times", *map(str, evaluations), "seeds"], lines) + note


NEAR = 1.05
"""FID over the default's that still counts as equal."""


def _pareto_table(of: Sequence[Group]) -> list[str]:
    """Every setting, the fastest first, with its FID and time over the default's of the same seeds."""
    default = next((group.by_seed for group in of if group.value == DEFAULT), {})
    lines, near = [], []
    for group in sorted(of, key=lambda group: group.mean("time_ratio") or math.inf):
        seeds, time = group.by_seed, group.mean("time_ratio")
        over = [row["fid"] / default[seed]["fid"] for seed, row in seeds.items() if seed in default]
        times = [row["time_ratio"] for row in seeds.values() if "time_ratio" in row]
        seconds, evaluations = group.mean("seconds_per_image"), group.mean("evaluations")
        cells = [
            str(group.value), _number(evaluations, "g"), _with_spread(group.best, ".3f"), _with_spread(over, ".2f"),
            _with_spread(times, ".3f"), _number(1 / time if time else None, ".2f"),
            _number(1000 * seconds if seconds else None, ".1f"), in_ranges(seeds),
        ]  # fmt: skip
        lines.append(cells)
        if group.value != DEFAULT and over and time and statistics.mean(over) <= NEAR:
            near.append(f"{group.value}, {1 / time:.2f} times as fast as the default")
    head = ["setting", "evaluations", "FID", "over the default's", "time over the default's", "times as fast"]
    note = "Times are of batches of 16 images; settings took turns, and a ratio is the median over the rounds."
    fastest = f"The fastest within 5 % of the default's FID: {near[0]}." if near else ""
    fastest = fastest or "No other timed setting is within 5 % of the default's FID."
    return [*_markdown([*head, "ms per image", "seeds"], lines), "", f"{note} {fastest}"]


def _difference(pair: Paired) -> str:
    if not pair.differences:
        return "-"
    return f"{pair.mean:+.3f}" + (f" ± {pair.spread:.3f}" if pair.spread is not None else "")


def _with_spread(values: Sequence[float], form: str) -> str:
    """The mean, and of several values their sample standard deviation."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(row) + " |" for row in rows]
