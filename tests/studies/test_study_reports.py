"""Study reports: pairs by seed, costs relative to PRA, commands, and plots of the committed rows."""

import csv
import math
import warnings
from collections import Counter
from pathlib import Path

import pytest
from support.refusal import refused

from studies import SETTINGS, STUDIES
from studies.catalogue import only
from studies.groups import groups
from studies.names import COLOURS, MARKERS, NAMES, in_ranges
from studies.pairs import paired, two_sided
from studies.plot_parts import LEAST_SPAN, ticks_between
from studies.plots import draw, draw_tokens
from studies.plots_sampling import SOLVERS
from studies.records import Records, read_rows
from studies.report import commands, with_shorter, write_report
from studies.report_probe import by_name, chosen, probe_table
from studies.settings import SCALES
from studies.tables import VARIANTS, tables

ROOT = Path(__file__).parents[2]
DIGITS = SETTINGS["digits-16"]


def row(system, seed, guidance, fid, **more):
    return {
        "dataset": "digits", "setting": "digits-16", "scale": "small", "tokens": 16, "system": system, "seed": seed,
        "guidance": guidance, "fid": fid, "run": f"{system}{seed}", "measured": f"guidance={guidance}", "images": 4,
        "accuracy": 0.5, "steps": 1, "parameters": 9, "train_seconds": 1.0, "commit": "c", "hardware": "h", **more,
    }  # fmt: skip


def table(lines, place=0):
    """Return the rows of table number ``place``, each as a dict by column name."""
    found = []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            found += [] if before.startswith("|") else [[]]
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    head, _, *rest = found[place]
    return [dict(zip(head, cells, strict=True)) for cells in rest]


def test_systems_are_paired_by_seed_at_their_best_guidance():
    rows = [
        row("pra", 0, 1.0, 1.0), row("pra", 1, 1.0, 2.0), row("pra", 2, 1.0, 3.0), row("pra", 7, 1.0, 9.0),
        row("jit", 0, 1.0, 9.0), row("jit", 1, 1.0, 9.0), row("jit", 2, 1.0, 9.0), row("jit", 5, 1.0, 9.0),
        row("jit", 0, 2.0, 1.5), row("jit", 1, 2.0, 3.5), row("jit", 2, 2.0, 4.0), row("jit", 5, 2.0, 0.1),
        row("states", 8, 1.0, 1.0),  # shares no seed with PRA
    ]  # fmt: skip
    pra, jit, states = groups(rows)
    (pair,) = paired([pra, jit], pra)
    assert pair.differences == {0: 0.5, 1: 1.5, 2: 1.0}
    assert (pair.mean, pair.spread) == (1.0, 0.5)
    (alone,) = paired([states], pra)
    assert not alone.differences
    assert math.isnan(alone.mean)
    (line,) = table(tables(STUDIES["systems"], rows), 1)
    assert line == {"system": "JiT", "FID less PRA's": "+1.000 ± 0.500", "n": "3", "seeds": "0-2", "p": "0.074"}
    pra, jit = groups([row("pra", 0, 1.0, 1.0, judge="a"), row("jit", 0, 1.0, 2.0, judge="b")])
    assert paired([pra, jit], pra)[0].differences == {}, "figures of two judges must not be paired"
    rows = [row("pra", 0, 1.0, 1.0), row("pra", 1, 1.0, 2.0, judge="a"), row("jit", 0, 1.0, 3.0)]
    assert [line["seeds"] for line in table(tables(STUDIES["systems"], rows))] == ["0,1 (2 judges)", "0"]


def test_two_sided_equals_students_t():
    assert two_sided(0.0, 3) == 1.0
    assert two_sided(1.0, 1) == pytest.approx(0.5)  # Cauchy's
    assert two_sided(-(2**0.5), 2) == pytest.approx(1 - 0.5**0.5)
    stats = pytest.importorskip("scipy.stats", reason="comes with the extra train")
    for t in (-40.0, -3.0, 0.3, 2.5, 12.0):
        for freedom in range(1, 12):
            assert two_sided(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-12)


def test_pairs_have_the_same_number_of_steps():
    rows = [
        row(system, 0, 1.0, fid, value=steps)
        for system, steps, fid in (("pra", 4800, 2.0), ("jit", 4800, 1.0), ("jit", 1200, 8.0), ("pra", 1200, 3.0))
    ]
    lines = table(tables(STUDIES["length"], rows), 1)
    assert [(line["steps"], line["FID less PRA's"], line["p"]) for line in lines] == [
        ("1200", "+5.000", "-"), ("4800", "-1.000", "-"),
    ]  # fmt: skip
    equal = [row(system, seed, 1.0, fid) for system, fid in (("pra", 1.0), ("jit", 2.0)) for seed in (0, 1)]
    assert table(tables(STUDIES["systems"], equal), 1)[0]["p"] == "-"  # t is undefined without a spread


def test_variants_are_compared_on_their_own_seeds():
    rows = [row("pra", seed, 2.0, fid, value="PRA") for seed, fid in ((0, 1.0), (1, 2.0), (2, 6.0))]
    rows += [row("pra", 1, 2.0, 2.5, value="no L_aux"), row("pra", 9, 1.0, 2.5, value="clean inputs")]
    lines = {line["PRA, but"]: line for line in table(tables(STUDIES["ablation"], rows))}
    assert {name: line["less PRA's, same seeds"] for name, line in lines.items()} == {
        "PRA": "-", "no L_aux": "+0.500", "clean inputs": "-",
    }  # fmt: skip
    assert lines["PRA"]["seeds"] == "0-2"


SYSTEMS = pytest.param("systems", marks=pytest.mark.slow)  # slow: it counts the FLOPs of every system


@pytest.mark.parametrize("name", [SYSTEMS, "noise", "length", "rollout-gap", "probe", "solver", "pareto"])
def test_committed_pages_match_the_committed_rows(name, tmp_path, monkeypatch):
    """Write the report of the setting with the fewest rows: each of its lines is in the committed page."""
    kept = ROOT / "studies" / name
    rows = read_rows(kept / "results.csv")
    counts = Counter(row["setting"] for row in rows)
    chosen = [row for row in rows if row["setting"] == min(counts, key=counts.__getitem__)]
    monkeypatch.setattr("studies.report.draw", lambda *_: None)
    for samples in kept.glob("*-samples.jpg"):
        (tmp_path / samples.name).touch()
    readme, *_ = write_report(STUDIES[name], chosen, tmp_path)
    page = (kept / "README.md").read_text().splitlines()
    lines = readme.read_text().splitlines()
    assert len(lines) > 10
    assert [line for line in lines if line not in page] == []


def test_pareto_table_has_ratios_of_the_same_seeds():
    figures = [
        ("default", 0, 2.0, 1.0), ("default", 1, 4.0, 1.0), ("groups-4", 0, 4.0, 0.2), ("DPM, 3 steps", 0, 2.0, 0.4),
        ("DPM, 3 steps", 1, 4.2, 0.6),
    ]  # fmt: skip
    times = [{"time_ratio": ratio, "seconds_per_image": 0.02 * ratio} for *_, ratio in figures]
    rows = [
        row("pra", seed, 2.0, fid, value=value, evaluations=3, **time)
        for (value, seed, fid, _), time in zip(figures, times, strict=True)
    ]
    lines = tables(STUDIES["pareto"], rows)
    shown = [(line["setting"], line["over the default's"], line["times as fast"]) for line in table(lines)]
    assert shown == [
        ("groups-4", "2.00", "5.00"),
        ("DPM, 3 steps", "1.02 ± 0.04", "2.00"),
        ("default", "1.00 ± 0.00", "1.00"),
    ]
    assert lines[-1].endswith("within 5 % of the default's FID: DPM, 3 steps, 2.00 times as fast as the default.")


def test_probe_table_chooses_by_validation():
    found = [
        ("pra", 0, 1, 0.5, 0.7), ("pra", 1, 1, 0.6, 0.7), ("pra", 0, 2, 0.9, 0.6), ("pra", 1, 2, 0.9, 0.6),
        ("pra", 0, 3, 0.9, 0.9),  # ignored: other layers have two seeds
        ("random", 0, 1, 0.3, 0.3), ("pixels", 0, None, 0.8, 0.8),
    ]  # fmt: skip
    rows = [dict(zip(("system", "seed", "layer", "top1", "validation"), values, strict=True)) for values in found]
    rows = [row | {"pooling": row["layer"] and "mean"} for row in rows]
    rows[5]["value"] = "pra"
    assert chosen(by_name(rows)["PRA"]).layer == 1
    _, lines = probe_table(rows)
    assert [line[0] for line in lines] == ["raw pixels", "PRA", "random weights (PRA)"]
    assert lines[1][1:4] == ["55.0 % ± 7.1", "1", "mean"]
    assert lines[0][1:4] == ["80.0 %", "-", "-"]


def test_best_guidance_minimises_the_mean_over_seeds(tmp_path):
    rows = [
        row("pra", 0, 1.0, 3.0), row("pra", 1, 1.0, 3.2), row("pra", 0, 2.0, 1.0), row("pra", 1, 2.0, 9.0),
        row("pra", 0, 3.0, 0.1),  # ignored: other guidances have two seeds
        row("jit", 0, 1.0, 2.0),
    ]  # fmt: skip
    pra, jit = groups(rows)
    assert (pra.guidance, pra.fid, pra.seeds) == (1.0, pytest.approx(3.1), 2)
    assert pra.spread == pytest.approx(0.1 * 2**0.5)
    assert (jit.guidance, jit.fid, jit.spread) == (1.0, 2.0, None)
    readme, picture = write_report(STUDIES["systems"], rows, tmp_path)
    table = [line for line in readme.read_text().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[1:3] for line in table[2:4]] == [["2.000", "1"], ["3.100 ± 0.141", "1"]]
    assert picture.stat().st_size > 1000


def test_records_keep_their_rows(tmp_path):
    records = Records(tmp_path, "systems")
    records.replace([row("pra", 1, 1.0, 3.0), row("pra", 0, 1.0, 2.5)])
    records.replace([row("pra", 1, 1.0, 4.0)])
    text = (tmp_path / "systems" / "results.csv").read_text()
    assert [line["fid"] for line in csv.DictReader(text.splitlines())] == ["2.5", "4"]
    assert Records(tmp_path, "systems").rows == [row("pra", 0, 1.0, 2.5), row("pra", 1, 1.0, 4.0)]
    varied = [row("pra", 0, 1.0, 2.5, judge="a") | {"value": value} for value in (0.0, "PRA")]
    Records(tmp_path, "noise").replace(varied)
    again = Records(tmp_path, "noise")
    again.replace(varied)
    assert [r["value"] for r in again.rows] == [0.0, "PRA"]
    (known,) = again.known("pra0", "guidance=1.0", "a")  # one result, though several rows hold it
    assert known["fid"] == 2.5
    assert again.known("pra0", "guidance=1.0", "b") == []
    assert again.known("pra1", "guidance=1.0", "a") == []  # its judge is not recorded
    (tmp_path / "systems" / "results.csv").write_text("a,b\n1,2\n")
    refused(lambda: Records(tmp_path, "systems"), "results.csv", "not a study's table")
    refused(lambda: Records(tmp_path / "systems" / "results.csv", "noise"), "noise cannot be made", "another place")


def test_commands_reproduce_the_rows_of_all_sessions():
    study = STUDIES["systems"]
    systems = [cell.system for cell in study.cells(DIGITS, SCALES["cpu"])]
    words = "python -m studies systems --setting digits-16 --scale cpu"

    def of(seeds):
        rows = [row(name, seed, 1.0, 3.0, scale="cpu") for name, numbers in seeds.items() for seed in numbers]
        return commands(study, rows)

    assert of(dict.fromkeys(systems, (1,))) == ["```sh", f"{words} --seeds 1", "```"]
    assert of({"pra": (0, 2), "jit": (0, 2)}) == ["```sh", f"{words} --systems pra,jit --seeds 0,2", "```"]
    more = of(dict.fromkeys(systems, (0, 1, 2)) | dict.fromkeys(("pra", "reconstructed"), (0, 1, 2, 3, 4, 5)))
    rest = ",".join(name for name in systems if name not in ("pra", "reconstructed"))
    assert set(more[1:-1]) == {
        f"{words} --systems pra,reconstructed --seeds 0-5", f"{words} --systems {rest} --seeds 0-2",
    }  # fmt: skip
    part = only(study, "system", ["jit"], DIGITS, SCALES["cpu"])
    assert commands(part, [row("pra", 0, 1.0, 3.0, scale="cpu")])[1] == f"{words} --systems pra --seeds 0"
    solvers = [row("pra", 0, 1.5, 1.0), row("pra", 1, 1.5, 1.0), row("pra, distilled", 0, 1.5, 1.0)]
    assert commands(STUDIES["solver"], solvers)[1].endswith("--seeds 0,1")  # --systems cannot take a name with a comma
    ladder = STUDIES["recipe"], [row("pra", seed, 1.0, 3.0, scale="cpu", value="plus") for seed in (0, 1)]
    assert commands(*ladder)[1].endswith("recipe --setting digits-16 --scale cpu --values plus --seeds 0,1")
    # The text says how many rows a command makes beyond the table.
    cells = [cell for cell in STUDIES["noise"].cells(DIGITS, SCALES["cpu"]) if cell.system == "pra"]
    rows = [row("pra", seed, 1.0, 3.0, scale="cpu", value=cell.value) for cell in cells for seed in (0, 1)]
    assert "more than" not in "\n".join(commands(STUDIES["noise"], rows))
    assert "makes 1 more than the table has so far" in "\n".join(commands(STUDIES["noise"], rows[:-1]))
    assert [in_ranges(numbers) for numbers in ([], [3], [1, 0], [2, 0, 1, 5, 7, 8, 9])] == ["", "3", "0,1", "0-2,5,7-9"]


def legends(figure):
    """Return the texts of all legends of a figure; without a legend, the names along its first y axis."""
    boxes = [*figure.legends, *(legend for axes in figure.axes if (legend := axes.get_legend()))]
    found = [text for legend in boxes for text in legend.get_texts()] or figure.axes[0].get_yticklabels()
    return {text.get_text() for text in found}


def drawn(name, rows):
    """Draw and return a study's figure; a warning fails the test."""
    pytest.importorskip("matplotlib", reason="draws the plots")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_tokens(STUDIES["token-dimension"], rows) if name == "tokens" else draw(STUDIES[name], rows)
        if figure is not None:
            figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (ROOT / "studies").glob("*/results.csv")))
def test_every_study_is_drawn_from_its_rows(name):
    rows = read_rows(ROOT / "studies" / name / "results.csv")
    last = max(row["setting"] for row in rows)
    shown = legends(drawn(name, [row for row in rows if row["setting"] == last]))
    if name == "solver":
        assert {row["solver"].partition(", ")[0] for row in rows} - shown == {"shortcut"}
        assert "shortcut (PRA, distilled head)" in shown
    elif name not in VARIANTS:
        assert {NAMES[row["system"]] for row in rows if row["setting"] == last} - {"random weights"} <= shown
        assert all(text.partition(" (")[0] in NAMES.values() for text in shown)
    if name == "token-dimension":
        assert legends(drawn("tokens", rows)) == {NAMES[row["system"]] for row in rows}


def test_a_system_has_its_colour_in_every_plot():
    rows = read_rows(ROOT / "studies" / "probe" / "results.csv")
    figure = drawn("probe", [row for row in rows if row["setting"] == "fashion-64"])
    lines = {line.get_label(): line for line in figure.axes[1].get_lines()}
    assert lines["PRA"].get_color() == lines["random weights (PRA)"].get_color() == COLOURS["pra"]
    assert lines["random weights (PRA)"].get_linestyle() == "--"
    assert not {colour for colour, _ in SOLVERS.values()} & set(COLOURS.values())
    assert len(set(COLOURS.values())) == len(set(MARKERS.values())) == len(COLOURS)


def test_a_dot_for_every_seed():
    rows = [row("pra", seed, 1.0, 2.0 + seed, value=0.9) for seed in range(3)] + [row("pra", 0, 1.0, 3.0, value=1.0)]
    (states,) = drawn("noise", rows).axes  # no panel for pixel noise: it has no rows
    dots = [line for line in states.get_lines() if line.get_linestyle() == "None"]
    assert sorted(y for line in dots for y in line.get_ydata()) == [2.0, 3.0, 3.0, 4.0]
    (mean,) = [line for line in states.get_lines() if line.get_label() == "PRA"]
    assert dict(zip(mean.get_xdata(), mean.get_ydata(), strict=True)) == {0.9: 3.0, 1.0: 3.0}


def test_accuracy_by_length_is_at_one_guidance():
    rows = [
        row("pra", 0, guidance, fid, value=steps, accuracy=guidance / 10)
        for steps, best in ((1200, 3.0), (4800, 2.0))
        for guidance, fid in ((2.0, 1.0 + (best != 2.0)), (3.0, 1.0 + (best != 3.0)))
    ]
    right = drawn("length", rows).axes[1]
    assert "guidance scale 3" in right.get_ylabel()
    (line,) = [line for line in right.get_lines() if line.get_label() == "PRA"]
    assert list(line.get_ydata()) == [0.3, 0.3]


def test_token_sizes_are_compared_within_a_setting(tmp_path):
    rows = [row("jit", seed, 1.0, 4.0 + 2 * seed, setting="a", value=48) for seed in (0, 1)]
    rows += [row("pra", 0, 1.0, 2.5, setting="a", value=48), row("jit", 0, 1.0, 30.0, setting="b", value=768)]
    (axes,) = drawn("tokens", rows).axes
    heights = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert (heights["JiT"], heights["PRA"]) == ([1.0, 1.0], [0.5])
    readme, first, *_ = write_report(STUDIES["token-dimension"], rows, tmp_path)
    assert first.name == "tokens-small.png"
    assert readme.read_text().index(first.name) < readme.read_text().index("## a")
    assert drawn("tokens", rows[:3]) is None  # a single token size
    assert drawn("tokens", [row for row in rows if row["system"] == "pra"]) is None


@pytest.mark.parametrize("name", STUDIES)
def test_one_old_row_of_unknown_system_is_reported(name, tmp_path):
    pytest.importorskip("matplotlib", reason="draws the plots")
    # Only the columns of the first version: those of later versions are optional.
    figures = {"solver": "newton, wavy", "evaluations": 2, "tokens": 4, "condition_gap": 0.0, "position": 1}
    figures["value"] = "other" if name in VARIANTS else 48
    if name == "probe":
        figures = {"top1": 0.5, "validation": 0.5, "held_out": 10, "layer": 1, "pooling": "mean"}
    old = row("novel", 4, 1.0, 2.0, setting="elsewhere-16", **figures)
    for column in ("accuracy", "train_seconds", "commit", "hardware"):
        del old[column]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        readme, *pictures = write_report(STUDIES[name], [old], tmp_path)
    assert [picture.name for picture in pictures] == ["elsewhere-16-small.png"]
    assert "--seeds 4" in readme.read_text()


def test_longer_trainings_are_drawn_with_shorter_ones():
    long, lengthened = "fashion-64-long", SETTINGS["fashion-64-long"].lengthens
    short = [
        row("pra", 0, 1.0, 3.0, setting=lengthened, value=1200, run="a"),
        row("pra", 0, 1.0, 2.0, setting=lengthened, value=4800, run="b"),
        row("pra", 1, 1.0, 2.0, setting=lengthened, value=4800, run="c"),
        row("pra", 0, 1.0, 2.0, setting="emoji-64", value=4800, run="d"),
    ]
    own = [
        row("pra", 0, 1.0, 2.0, setting=long, value=4800, run="b"),  # the same run as in the shorter setting
        row("pra", 0, 1.0, 1.0, setting=long, value=19200, run="e"),
    ]
    study = STUDIES["length"]
    assert [row["run"] for row in with_shorter(study, [*short, *own], own)] == ["a", "b", "c", "e"]
    assert with_shorter(study, [*short, *own], short[:3]) == short[:3]
    assert with_shorter(STUDIES["noise"], [*short, *own], own) == own


def test_every_axis_has_ticks_to_read():
    assert all(len(ticks_between(low, low * LEAST_SPAN)) >= 3 for low in (0.47, 0.5, 0.96, 1.0, 3.3, 9.1, 47.0))
