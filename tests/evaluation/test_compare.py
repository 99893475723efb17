"""``pra compare``: differing settings, comparable figures, and overlaid curves."""

import functools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.answer import caller
from support.files import contents
from support.pages import ROOT
from support.refusal import refused

import pra
from pra.config import apply_settings, to_dict
from pra.evaluation import compare as module
from pra.training.run import loss_terms, read_metrics
from pra.utils.extras import install_command

ORIGIN = {
    "features": {"name": "classifier", "sha256": "fe" * 32, "versions": {}, "held_out_accuracy": 0.9},
    "reference": {
        "name": "digits", "sha256": "5a" * 32, "file_sha256": None, "count": 1500, "images_sha256": "1a" * 32,
    },
    "count": 1000,
    "seed_of_subsets": 2020,
    "kid": {"subsets": 100, "size": 1000},
    "precision_recall": {"neighbours": 3},
    "images": {
        "model": "runs/a/checkpoints/step-00000020",
        "weights_sha256": "ab" * 32,
        "sampling": {"guidance": 1.0, "steps": 25, "precision": "float32"},
        "labels": "index % 10",
    },
}  # fmt: skip


def evaluation(path, changes=None, **figures):
    """A file as `pra eval` writes it; ``changes`` to the provenance by dotted names, None takes one out."""
    origin = json.loads(json.dumps(ORIGIN))
    for name, value in (changes or {}).items():
        *parents, last = name.split(".")
        here = origin
        for parent in parents:
            here = here[parent]
        here[last] = value
        if value is None:
            del here[last]
    path.write_text(json.dumps({"figures": {"adm": figures or {"fid": 2.0}}, "provenance": origin}))
    return path


def row(answer, name):
    """Return the cells of a row; a mark is a separate cell."""
    return line(answer, f"  {name}  ").removeprefix(f"  {name}").split()


def write_metrics(run, rows):
    (run / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in rows))


def line(answer, beginning):
    (found,) = [line for line in answer.out.splitlines() if line.startswith(beginning)]
    return found


@pytest.fixture
def compare(capsys):
    return functools.partial(caller(capsys), "compare")


@pytest.fixture
def other(run):
    """Another run beside ``run``, with other settings, and more steps asked for."""
    folder = Path(shutil.copytree(run, run.with_name("other"), ignore=shutil.ignore_patterns("checkpoints")))
    settings = ["train.optimizer.lr=0.5", "train.steps=40", "train.rollout=Clean", "data.source=digits@test"]
    changed = apply_settings(pra.recipe("tiny"), settings)
    (folder / "config.json").write_text(json.dumps(to_dict(changed)))
    return folder


# --- settings and training ----------------------------------------------------------------------------------


def test_what_differs_between_runs_and_nothing_else(run, other, compare):
    answer = compare(run, f"fast={other}")
    assert (answer.code, answer.errors) == (0, [])
    assert answer.out.splitlines()[0].split() == ["run", "fast"]
    settings = answer.out[: answer.out.index("training\n")].splitlines()[2:]
    names = {line.split()[0] for line in settings}
    rollout = {"train.rollout.type", "train.rollout.t_min"}
    assert names == {"data.source", "train.optimizer.lr", "train.steps"} | rollout
    config = pra.recipe("tiny")
    assert row(answer, "train.optimizer.lr") == [str(config.train.optimizer.lr), "0.5"]
    assert row(answer, "train.rollout.type") == ["Parallel", "Clean"]
    assert row(answer, "train.rollout.t_min")[1] == "-"
    apply_settings(config, [f"{name}={row(answer, name)[0]}" for name in names])  # as --set takes them


def test_how_far_runs_came(run, other, compare):
    answer = compare(run, other)
    assert row(answer, "parameters") == ["0.074", "M"] * 2
    assert row(answer, "steps") == ["20", "of", "20", "20", "of", "40"]
    assert row(answer, "images seen") == ["160", "160"]
    rows = read_metrics(run)
    seconds = sum((rows[0]["step"]) * 8 / values["images_per_second"] for values in rows)
    assert float(row(answer, "seconds of training")[0]) == pytest.approx(seconds, abs=0.51)
    assert row(answer, "flow")[0] == f"{rows[-1]['flow']:.5g}"
    assert "shortcut  " not in answer.out
    assert "settings: the same" in compare(run, shutil.copytree(run, run.with_name("copy"))).out
    # The loss of a long run is the mean over the last steps.
    write_metrics(run, [rows[0] | {"step": step, "flow": float(step)} for step in range(1, 2 * module.PARTS + 1)])
    assert row(compare(run, evaluation(run.parent / "a.json")), "flow") == [str(2 * module.PARTS - 0.5), "-"]


def test_losses_are_the_terms_that_runs_have(run, other, compare):
    """An old run has other names for the terms; a term that has ended is left out."""
    rows = read_metrics(run)
    for values in rows[:-1]:
        values["ended"] = 1.0
    rows[0]["shortcut"] = 0.0
    old = {"pixel": "reconstruction"}
    write_metrics(run, [{old.get(name, name): value for name, value in values.items()} for values in rows])
    answer = compare(run, other)
    last = read_metrics(other)[-1]
    assert row(answer, "reconstruction") == [f"{rows[-1]['pixel']:.5g}", "-"]
    assert row(answer, "pixel") == ["-", f"{last['pixel']:.5g}"]
    assert row(answer, "auxiliary") == [f"{rows[-1]['auxiliary']:.5g}", f"{last['auxiliary']:.5g}"]
    assert "ended" not in answer.out
    assert "shortcut" not in answer.out


# --- figures ------------------------------------------------------------------------------------------------


def test_the_best_is_marked_by_the_direction_of_each_figure(tmp_path, compare):
    a = evaluation(tmp_path / "a.json", fid=2.0, kid=-0.002, recall=0.5, accuracy=0.91, kid_std=0.1, sfid=None, psnr=7)
    b = evaluation(tmp_path / "b.json", fid=3.0, kid=-0.001, recall=0.6, accuracy=0.95, kid_std=0.2, sfid=None, psnr=7)
    c = evaluation(tmp_path / "c.json", fid=2.5, kid=0.004, recall=0.6, accuracy=0.80, kid_std=0.3, sfid=None)
    answer = compare(a, b, c)
    assert row(answer, "fid") == ["2", "*", "3", "2.5"]
    assert row(answer, "recall") == ["0.5", "0.6", "*", "0.6", "*"]
    assert row(answer, "kid") == ["-0.002", "*", "-0.001", "*", "0.004"]  # just below 0 is 0
    assert row(answer, "accuracy") == ["0.91", "*", "0.95", "*", "0.8"]  # real images have 0.9
    assert row(answer, "kid_std") == ["0.1", "0.2", "0.3"]
    assert row(answer, "psnr") == ["7", "7", "-"]
    assert "sfid" not in answer.out
    assert line(answer, "* best of its row")


def test_the_directions_are_those_of_the_documentation():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*?\|[^|]*\| (low|high)", text, re.M)
    assert {name for name, better in rows if better == "low"} == set(module.LOWER)
    assert {name for name, better in rows if better == "high"} == set(module.HIGHER)


def test_nothing_is_marked_where_figures_do_not_compare(tmp_path, compare):
    a, c = evaluation(tmp_path / "a.json", fid=2.0), evaluation(tmp_path / "c.json", fid=4.0)
    b = evaluation(tmp_path / "b.json", {"features.sha256": None, "count": 9}, fid=3.0)
    answer = compare(a, b, c)
    assert row(answer, "fid") == ["2", "3", "4"]
    said = line(answer, "figures do not compare, and none is marked: b.json differs in ")
    assert "the features (unknown; a.json: classifier fefefefefefe)" in said
    assert "c.json" not in said
    shipped = Path(pra.__file__).parent / "shipped" / "figures.json"
    answer = compare(f"shipped={shipped}", a)
    assert answer.code == 0
    assert "a.json differs in the features" in line(answer, "figures do not compare")


OLD = {"reference.images_sha256": None}


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({}, {"features.sha256": "cd" * 32}, f"the features (classifier {'cd' * 6}; a: classifier fefefefefefe)"),
        ({}, {"features.versions": {"timm": "1"}}, "the packages of the features (timm 1; a: )"),
        ({}, {"reference.images_sha256": "99" * 32}, "the reference (999999999999; a: 1a1a1a1a1a1a)"),
        ({}, {"count": 500}, "the number of images (500; a: 1000)"),
        ({}, {"kid.subsets": 10}, "the subsets of KID (10; a: 100)"),
        ({}, {"seed_of_subsets": 1}, "the seed of the subsets (1; a: 2020)"),
        ({}, {"precision_recall.neighbours": 5}, "the neighbours of precision and recall (5; a: 3)"),
        (OLD, {}, None),  # equal statistics
        (OLD, {"reference.name": "elsewhere", "features.versions": None}, None),
        (OLD | {"kid": None, "seed_of_subsets": None}, {}, None),  # had one value then
        (OLD, {"reference.sha256": "00"}, "the reference (00; a: 5a5a5a5a5a5a)"),
        (OLD, {"reference.sha256": None}, "the reference (unknown; a: 5a5a5a5a5a5a)"),
        (OLD, {"reference.sha256": "00", "features.sha256": "00"}, "the features (classifier 00; a: classifier fe"),
        ({}, {"reference.sha256": "00"}, None),  # the same images, summed in other batches
        ({"comparable_sha256": "12"}, {"comparable_sha256": "12"}, None),  # as reports say now
    ],
)
def test_evaluations_compare_by_hash_or_fields(tmp_path, ours, theirs, said):
    a, b = evaluation(tmp_path / "a.json", ours), evaluation(tmp_path / "b.json", theirs)
    found = module.obstacle(*module.read_columns([f"a={a}", f"b={b}"]))
    assert (found is None) == (said is None)
    assert (said or "") in (found or "")


def test_reconstructions_compare_for_the_same_images(tmp_path, compare):
    def copies(name, fid, source):
        path = evaluation(tmp_path / name, {"reconstruction": {"source": source, "count": 1000}}, fid=fid)
        values = json.loads(path.read_text())
        values["figures"]["reconstruction"] = {"ssim": fid / 10}
        path.write_text(json.dumps(values))
        return path

    a, b = copies("a.json", 2.0, "digits"), copies("b.json", 3.0, "digits")
    assert row(compare(a, b), "ssim") == ["0.2", "0.3", "*"]
    answer = compare(a, copies("c.json", 3.0, "emoji"))
    assert row(answer, "ssim") == ["0.2", "0.3"]
    assert row(answer, "fid") == ["2", "*", "3"]
    assert "c.json differs in the images (1000 of emoji; a.json: 1000 of digits)" in answer.out
    old = evaluation(tmp_path / "old.json", {"reconstruction": {"source": "digits"}})
    assert "a.json differs in the images (1000 of digits; old.json: None of digits)" in compare(old, a).out


def test_what_was_judged(tmp_path, compare):
    a = evaluation(tmp_path / "a.json", {"images.sampling.guidance": 2.0})
    sampling = {"guidance": 1.0, "steps": 25, "precision": "float32"}
    made = {
        "weights": {"file": "power-0.1.safetensors", "sha256": "cd" * 32},
        "sampling": sampling,
        "images": {"labels": [*range(10)], "order": "in turn"},
    }
    b = evaluation(tmp_path / "b.json", {"images": {"file": "/x/many.npz", "made": made}})
    answer = compare(a, b, evaluation(tmp_path / "c.json", {"images": {"folder": "/x/pictures"}}))
    assert row(answer, "images") == ["1000", "1000", "1000"]
    assert row(answer, "weights") == ["-", "power-0.1", "-"]
    assert row(answer, "weights, SHA-256") == ["ab" * 6, "cd" * 6, "-"]
    assert row(answer, "made by") == ["step-00000020", "many.npz", "pictures"]
    assert row(answer, "sampling.guidance") == ["2.0", "1.0", "-"]
    assert "sampling.steps" not in answer.out
    assert "labels" not in answer.out  # "in turn" is "index % 10"
    assert "training" not in answer.out


def test_a_runs_own_figures(run, other, compare):
    assert "no figures: `pra eval RUN --out RUN/figures.json`" in compare(run, other).out
    evaluation(run / "figures.json", {"images.model": "run/checkpoints/step-00000010"}, fid=3.0)
    evaluation(run / "other.json", fid=4.0)  # to be named as an argument
    answer = compare(run, other)
    assert row(answer, "fid") == ["3", "-"]  # the only figure has nothing to compare with
    assert line(answer, "run: the figures are of step-00000010, and the run has since reached step-00000020")
    evaluation(run / "figures.json", fid=5.0)
    evaluation(other / "figures.json", fid=1.0)
    answer = compare(run, other)
    assert row(answer, "fid") == ["5", "1", "*"]
    assert "gone on" not in answer.out


# --- names --------------------------------------------------------------------------------------------------


def test_names_and_paths_may_hold_an_equals_sign(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [evaluation(tmp_path / name) for name in ("a/lr=1.json", "x.json", "a/same.json", "b/same.json")]
    three, four = (evaluation(tmp_path / f"lr={rate}.json") for rate in (3, 4))
    columns = module.read_columns([*map(str, paths), f"lr=2={three}", f"\x1b[2J={four}"])
    assert [column.name for column in columns] == ["lr=1.json", "x.json", *map(str, paths[2:]), "lr=2", "\x1b[2J"]
    assert module.compared(columns).replace("\n", "").isprintable()  # no control characters


def test_long_cells_are_shortened_unless_alike():
    long = [f"{'a' * 40}{middle}{'b' * 40}" for middle in "xy"]
    rows = [module.Row("far", [long[0], "short"]), module.Row("near", long)]
    shown = module.rendered(["", ""], [module.Section("", rows)])
    assert max(map(len, shown.splitlines()[2].split())) <= module.LONGEST
    assert shown.splitlines()[3].split()[1:] == long


# --- the command --------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_a_line(run, compare, monkeypatch):
    monkeypatch.chdir(run.parent)
    for name in ("good.json", "other.json"):
        evaluation(Path(name))
    for name, text in (("broken.json", "{"), ("there.png", "mine")):
        Path(name).write_text(text)
    for name in ("empty", "bare"):
        Path(name).mkdir()
    shutil.copy(run / "config.json", "bare")
    Path("link").symlink_to(run)
    before = contents(run.parent)
    for words, part in (
        (["run"], "1 argument(s)"),
        (["run", "nowhere"], "no file or folder nowhere"),
        (["run", "x" * 5000], "no file or folder xxx"),
        (["run", "again=link"], "run is given twice"),
        (["a=run", "a=good.json"], "2 arguments are called 'a'"),
        (["run", "empty"], "empty"),
        (["run", "run/checkpoints/step-00000020"], "step-00000020"),
        (["run", "bare"], "the run bare has no line in metrics.jsonl"),
        (["run", "broken.json"], "broken.json"),
        (["run", "run/config.json"], "config.json holds no figures"),
        (["run", "good.json", "--out", "there.png"], "there.png"),
        (["run", "good.json", "--out", "a.jpg"], "a.jpg"),
        (["run", "good.json", "--out", "good.json/a.png"], "good.json"),
        (["good.json", "other.json", "--out", "a.png"], "--out"),
    ):
        answer = compare(*words)
        assert answer.is_refusal(part)
        assert answer.out == ""
    assert contents(run.parent) == before


def test_curves_of_runs_with_other_terms_share_panels(run, other, tmp_path, compare, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra 'train'")
    rows = [{k: v for k, v in row.items() if k != "pixel"} | {"edges": 1.0} for row in read_metrics(other)]
    write_metrics(other, rows)
    figure = module.overlaid(module.read_columns([str(run), str(other)]))
    assert {axes.get_title(): [line.get_label() for line in axes.lines] for axes in figure.axes} == {
        "pixel": ["run"],
        "flow": ["run", "other"],
        "auxiliary": ["run", "other"],
        "edges": ["other"],
        "smallest std of the states": ["run", "other"],
    }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["run", "other"]
    for folder, highest in ((run, 2.0), (other, 1e9)):  # a loss that explodes
        terms = loss_terms(read_metrics(run)[:1])
        lines = [rows[0] | {"step": at, **dict.fromkeys((*terms, "state_std"), highest / at)} for at in (1, 2, 3)]
        write_metrics(folder, lines)
    figure = module.overlaid(module.read_columns([str(run), str(other)]))
    assert [axes.get_ylim()[1] for axes in figure.axes if axes.get_title() != "edges"] == [6.0] * 4

    out = tmp_path / "new" / "curves.png"
    formula = str(other.rename(other.with_name("a$x^2_{$")))  # which is none
    answer = compare(f"rate=1={run}", formula, evaluation(tmp_path / "a.json"), "--out", out)
    assert (answer.code, line(answer, "curves: ")) == (0, f"curves: {out}")
    with Image.open(out) as picture:
        assert picture.size == (1344, 700)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(lambda: module.overlaid(module.read_columns([str(run), formula])), install_command("train"))
    assert compare(run, formula).code == 0  # the table is still there
