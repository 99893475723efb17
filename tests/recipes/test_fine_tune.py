"""Fine-tuning: what a run keeps of another model, for which classes, and that the run starts from it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.data import PHOTOS
from support.files import contents
from support.models import JIT, LEARNED, PIXEL, batch, random_jit, random_model
from support.refusal import refused
from support.training import pictures

import pra
from pra.config import Clean, JiTConfig, LearningRate, ObjectiveConfig, OptimizerConfig, Parallel
from pra.data.survey import Range
from pra.models import build_model, weights
from pra.recipes import distill, fine_tune, own
from pra.recipes.fine_tune import propose
from pra.training.initial import EMBEDDING, load_initial, with_classes
from pra.training.run import read_run

CPU = torch.device("cpu")
PETS = replace(
    PHOTOS,
    source="folder:pets",
    images=1000,
    classes={"cats": 600, "dogs": 400},
    width=Range(4, 40, 400),
    height=Range(4, 30, 300),
    short_side=Range(4, 30, 300),
)
STILL = ["--set", "train.optimizer.lr=1e-12"]
"""A learning rate at which a step changes nothing visible."""


def named(model, classes):
    model.classes = tuple(classes)
    return model


def models():
    """Five classes, a to e."""
    return [named(model, "abcde") for model in (random_model(LEARNED), random_model(PIXEL), random_jit(JIT))]


def conditions(model, label):
    """Return what a model makes of a label, before anything that is drawn."""
    images, _, _ = batch(model.config)
    labels, patches = torch.full((len(images),), label), model.patchify(images)
    if isinstance(model.config, JiTConfig):
        return model(patches, torch.full((len(images), 1), 0.5), labels)  # type: ignore[no-any-return]
    return model.conditions(labels, patches[:, :-1])  # type: ignore[no-any-return,operator,union-attr]


@pytest.mark.parametrize("classes", ["b", "xbyda", "abcde", "vwxyzuts"])
@pytest.mark.parametrize("old", models(), ids=["learned", "pixel", "jit"])
def test_with_classes_keeps_known_and_begins_new_as_null(old, classes):
    new = named(build_model(replace(old.config, num_classes=len(classes)), seed=9), classes)
    new.load_state_dict(with_classes(old, new.classes))
    for place, name in enumerate(classes):
        known = old.classes.index(name) if name in old.classes else old.condition.null
        torch.testing.assert_close(conditions(new, place), conditions(old, known), rtol=0, atol=0)
    null = conditions(new, len(classes))
    torch.testing.assert_close(null, conditions(old, 5), rtol=0, atol=0)
    assert not torch.equal(null, conditions(old, 0))
    before = old.state_dict()
    shared = [name for name in before if not name.endswith(EMBEDDING)]
    assert len(shared) == len(before) - 1
    assert all(torch.equal(new.state_dict()[name], before[name]) for name in shared)


def test_classes_of_one_name_are_not_guessed():
    old, survey = named(random_model(num_classes=3), "aba"), replace(PETS, classes={"a": 500, "c": 500})
    for do in (lambda: with_classes(old, "ca"), lambda: settings(old, survey=survey)):
        refused(do, "2 of the model's classes and 1 of the data are called 'a'", code="conflict", value="a")
    refused(lambda: with_classes(old, "bb"), "1 of the model's classes and 2", code="conflict", value="b")
    assert torch.equal(with_classes(old, "aba")[EMBEDDING], old.state_dict()[EMBEDDING])
    with_classes(old, "bc")  # nothing to guess
    refused(lambda: old.condition.parse(["b", "a"], old.classes), "numbers: 0, 2", code="conflict", value="a")


def test_load_initial_takes_the_average_named(run):
    config = replace(read_run(run).model, num_classes=3)
    model = named(build_model(config, seed=9), "x3y")
    raw = pra.load(run, average="raw").head.out.weight  # type: ignore[union-attr]
    load_initial(str(run), model, "raw")
    assert torch.equal(model.head.out.weight, raw)
    origin = load_initial(str(run), model)
    assert torch.equal(model.head.out.weight, pra.load(run).head.out.weight)  # type: ignore[union-attr]
    assert not torch.equal(model.head.out.weight, raw)
    newest = weights.newest_checkpoint(run)
    assert newest is not None
    assert (origin["from"], origin["weights"]) == (str(run), str(newest / "ema.safetensors"))
    assert len(origin["sha256"]) == 64


def test_load_initial_of_another_model_is_refused(tmp_path):
    pra.save(random_model(), tmp_path / "saved")

    def load(model):
        load_initial(str(tmp_path / "saved"), model)

    refused(lambda: load(random_model(image_size=(12, 8))), "model.image_size: [6, 8] there", code="mismatch")
    refused(lambda: load(random_model(channels=1)), "model.channels: 3 there, 1 asked for")
    refused(lambda: load(random_jit()), code="mismatch", path=tmp_path / "saved")


def settings(model, run=None, survey=PETS, **length):
    length = length or {"steps": 160}
    return propose("runs/a", model, run, survey, length.get("minutes"), length.get("steps"), CPU)[0]  # type: ignore[arg-type]


def test_propose_keeps_the_runs_settings_at_a_lower_rate():
    run = pra.recipe("digits")
    run = replace(run, train=replace(run.train, rollout=Clean(), codec_warmup=3, batch_size=24))
    config = settings(build_model(run.model), run)
    same = {"objective", "rollout", "batch_size", "seed", "precision"}
    assert all(getattr(config.train, name) == getattr(run.train, name) for name in same)
    optimizer = config.train.optimizer
    assert optimizer.lr == run.train.optimizer.lr / fine_tune.LOWER < run.train.optimizer.lr
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.ema_decay) == (LearningRate.COSINE, 8, 0.95)
    assert (config.train.steps, config.train.codec_warmup) == (160, 0)
    assert config.model == replace(run.model, num_classes=2)
    assert (config.initial, config.recipe, config.targets) == ("runs/a", "fine-tuned", None)


def test_propose_of_a_distilled_run_trains_everything():
    run = distill.second_head(pra.recipe("digits"), "runs/digits", 100)
    model = build_model(run.model)
    model.sampling = run.sampling
    config = settings(model, run)
    assert (config.model, config.sampling.solver) == (replace(run.model, num_classes=2), run.sampling.solver)
    train, usual = config.train, ObjectiveConfig()
    assert train.trainable == ("all",)
    assert (train.objective.noise_draws, train.objective.shortcut_draws) == (usual.noise_draws, usual.shortcut_draws)
    assert train.optimizer.weight_decay == OptimizerConfig().weight_decay > 0
    assert train.objective.pixel_loss == run.train.objective.pixel_loss


def test_propose_without_a_run_takes_the_usual_settings():
    for model, rollout, width in (
        (random_model(), Parallel(t_min=0.9), 32),
        (random_model(PIXEL), Clean(), 32),
        (random_jit(), Clean(), 24),
    ):
        config = settings(model)
        assert (config.train.rollout, config.train.batch_size) == (rollout, 32)
        assert config.train.optimizer.lr == own.peak_rate(width) / fine_tune.LOWER


def test_propose_guidance_needs_classes():
    several, single = random_model(), random_model(num_classes=1)
    several.sampling = replace(several.sampling, guidance=3.0, steps=7)
    plain = replace(PETS, classes={"image": 1000})
    assert [settings(several, survey=pets).sampling.guidance for pets in (PETS, plain)] == [3.0, 1.0]
    assert [settings(single, survey=pets).sampling.guidance for pets in (PETS, plain)] == [own.GUIDANCE[3], 1.0]
    assert settings(several).sampling.steps == 7


def test_propose_time_becomes_steps(monkeypatch):
    monkeypatch.setattr(own, "seconds_per_step", lambda config, device: 2.0)
    monkeypatch.setattr(own, "can_compile", lambda device: False)
    run = pra.recipe("digits")
    run = replace(run, train=replace(run.train, batch_size=20, micro_batch_size=5))
    assert settings(build_model(run.model), run, minutes=10).train.steps == int(600 * own.TRAINING_SHARE / 2)
    assert settings(build_model(run.model), run, minutes=1e6).train.steps == fine_tune.EPOCHS * PETS.images // 20
    monkeypatch.setattr(own, "can_compile", lambda device: True)
    compiled = settings(build_model(run.model), run, minutes=10).train
    assert (compiled.compile, compiled.steps) == (True, int(600 * own.TRAINING_SHARE / 2 / own.COMPILED))
    few = replace(PETS, images=3)
    assert settings(build_model(run.model), run, few, minutes=1e6).train.steps == fine_tune.FEWEST_STEPS
    monkeypatch.setattr(own, "seconds_per_step", lambda config, device: float("inf"))
    refused(lambda: settings(build_model(run.model), run, minutes=10), "micro_batch_size=1", code="too-large", value=5)
    refused(lambda: settings(build_model(run.model), run, minutes=0), option="--minutes", value=0)


def test_propose_says_what_happens_to_pictures_and_classes():
    grey = named(random_model(channels=1, num_classes=2), ("cats", "cows"))  # type: ignore[arg-type]
    text = "\n".join(propose("runs/a", grey, None, PETS, None, 5, CPU)[1])
    for words in (
        "images of 6 x 8, the model's size: yours are 4 to 300, median 30 pixels on the short side: they "
        "are scaled and cut to the middle, and converted to grey for the model",
        "classes kept: cats; new, started from the null class: dogs; removed: cows",
    ):
        assert words in text
    tiny = replace(PETS, short_side=Range(4, 4, 4), grey=500, classes={str(n): 9 for n in range(30)})
    text = "\n".join(propose("runs/a", random_model(num_classes=30), None, tiny, None, 5, CPU)[1])
    for words in ("are enlarged", "converted to colour for the model", "0, 1, 2, 3, 4, 5, 6, 7 and 22 more"):
        assert words in text


def test_command_fine_tunes_a_grey_model_and_resumes(tmp_path, run, train, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(Path("pets"), ("3", "3", "cats", "cats"), (10, 12), "RGB")
    command = ["--from", "run", "--data", "folder:pets", "--steps", 2, *STILL]
    code, text = train(*command)
    assert code == 0, text
    for words in (
        "found in folder:pets:",
        "from run:",
        "converted to grey",
        "kept: 3; new",
        ": cats; removed: 0, 1,",
        "trained 2",
    ):
        assert words in text
    folder = Path("runs/own-pets-from-run")
    began = json.loads((folder / "environment.json").read_text())["initial"]
    assert (began["from"], json.loads((folder / "config.json").read_text())["initial"]) == ("run", "run")

    old, new = pra.load(run), pra.load(folder)
    assert (new.classes, new.config.num_classes) == (("3", "cats"), 2)
    for name, tensor in with_classes(old, new.classes).items():
        torch.testing.assert_close(new.state_dict()[name], tensor)

    shutil.rmtree(run)  # it is not needed any more
    monkeypatch.setattr(fine_tune, "propose", lambda *_: pytest.fail("chosen again"))
    assert "nothing to train" in train(*command)[1]
    code, text = train("--from", "run/", "--data", "folder:pets", "--steps", 3, *STILL)
    assert (code, "trained 1 step to 3" in text) == (0, True), text
    assert json.loads((folder / "environment.json").read_text())["initial"] == began

    before = contents(folder)
    for other in (["--from", "elsewhere"], ["--from", "run", "--set", "model.channels=3"]):
        code, text = train(*other, "--data", "folder:pets", "--run-dir", folder, "--steps", 4, *STILL)
        assert (code, text.count("pra: error"), "another configuration" in text) == (2, 1, True), text
    assert contents(folder) == before


def test_command_stopped_before_a_checkpoint_begins_again(tmp_path, run, train):
    pictures(tmp_path / "pets", ("3", "cats"), (10, 12), "RGB")
    command = ["--data", f"folder:{tmp_path / 'pets'}", "--run-dir", tmp_path / "new", *STILL]
    assert train("--from", run, *command, "--steps", 1)[0] == 0
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    code, text = train(*command)
    assert (code, "trained 1 step to 1" in text) == (0, True), text
    torch.testing.assert_close(pra.load(tmp_path / "new").head.out.weight, pra.load(run).head.out.weight)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:this training will take")  # on a busy machine
@pytest.mark.parametrize("model", [random_model(), random_jit()], ids=["pra", "jit"])
def test_command_fine_tunes_a_saved_model_without_classes(tmp_path, train, model):
    pra.save(model, tmp_path / "saved")
    data = pictures(tmp_path / "pets", ("", ""), (10, 12))
    code, text = train("--from", tmp_path / "saved", "--data", data, "--run-dir", tmp_path / "new", "--minutes", "0.05")
    assert (code, "trained 2 steps" in text) == (0, True), text
    new = pra.load(tmp_path / "new")
    assert (type(new), new.config.num_classes, new.classes) == (type(model), 1, ("image",))
    assert new.sampling.guidance == 1.0
    assert pra.Sampler(new).sample([0], [0]).shape == (1, 3, 6, 8)


def test_command_bad_input_is_one_line(tmp_path, run, train, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(Path("pets"), ("a", "b"))
    Path("begun").mkdir()
    Path("empty").mkdir()
    shutil.copy(run / "config.json", "begun")
    before = contents(tmp_path)
    for arguments, said in (
        ("", "pra train needs RECIPE, or --data folder:PHOTOS"),
        ("--run-dir nowhere", "no run at nowhere to resume"),
        ("--data folder:nowhere", "nowhere does not exist"),
        ("--data folder:empty", "empty holds no images"),
        ("--data pets", "Write folder:pets"),
        ("--data folder:pets --minutes 0", "--minutes 0 must be positive"),
        ("--data folder:pets --steps 0", "steps must be positive"),
        ("--from run", "pra train needs RECIPE, or --data"),
        ("--from run --run-dir new", "no run at new to resume"),
        ("--from nowhere --data folder:pets", "no run or model at nowhere"),
        ("--from pets --data folder:pets", "pets is neither a run nor a model"),
        ("--from begun --data folder:pets", "the run begun has no checkpoint yet"),
        ("--from run --data folder:nowhere", "nowhere does not exist"),
        ("--from run --data folder:pets --minutes 0", "--minutes 0 must be positive"),
        ("--from run --data folder:pets --steps 0", "steps must be positive"),
    ):
        code, text = train(*arguments.split())
        assert (code, text.count("\n"), text.startswith("pra: error: ")) == (2, 1, True), text
        assert said in text
        assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("initial", "told", "base"),
    [("hub:alice/flowers@v2", "`hub:alice/flowers@v2`", ["alice/flowers"]), ("/home/alice/flowers", "`flowers`", [])],
)
def test_card_names_where_the_weights_began(tmp_path, run, initial, told, base):
    config = run / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"initial": initial}))
    card = (pra.export(run, tmp_path / "shared") / "README.md").read_text()
    assert f"fine-tuned: began with the weights of {told}\n" in card
    matter = [line.partition(": ") for line in card.splitlines() if line.startswith("base_model")]
    assert [json.loads(value) for _, _, value in matter] == base
