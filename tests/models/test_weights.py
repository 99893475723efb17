"""Models and checkpoints on disk: whole, of any readable format, and never a pickle."""

import dataclasses
import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.files import change, contents, flip
from support.models import ALL, JITS, LEARNED, random_jit, random_model
from support.refusal import refused
from support.training import assert_same, tiny, train
from torch.overrides import TorchFunctionMode

import pra
from pra import load
from pra.config import SamplingConfig
from pra.models import build_model, weights
from pra.training import averages
from pra.training.averages import EMA, exponential

MODELS = {name: partial(random_model, config) for name, config in ALL.items()}
MODELS |= {name: partial(random_jit, config) for name, config in JITS.items()}


class Draws(TorchFunctionMode):
    """Counts the numbers that are drawn within."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            self.numbers += result.numel()
        return result


@pytest.fixture
def unset_is_nan():
    """Memory that torch allocates and nobody sets holds nan."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("unset_is_nan")
def test_load_sets_every_number_and_draws_none(name, tmp_path):
    model = MODELS[name]()
    assert all(p.isnan().any() for p in build_model(model.config, seed=None).parameters() if p.ndim == 2)
    for half in (False, True):
        folder = tmp_path / str(half)
        folder.mkdir()
        weights.write_model(model, folder, half)
        with Draws() as drawn:
            loaded = load(folder)
        assert drawn.numbers == 0
        expected = {name: p.half().float() if half else p for name, p in model.named_parameters()}
        found = dict(loaded.named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert all(p.requires_grad and p.dtype is torch.float32 for p in found.values())
        buffers = dict(model.named_buffers())
        assert buffers
        assert all(torch.equal(value, buffers[name]) for name, value in loaded.named_buffers())


@pytest.mark.parametrize("config", [ALL["learned"], JITS["jit"]])
def test_build_model_draws_once_and_not_on_meta(config):
    with Draws() as drawn:
        model = build_model(config)
    assert drawn.numbers == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    with torch.device("meta"):
        model = build_model(config, seed=None)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_average_of_parts_is_assembled_without_draws(monkeypatch):
    ema = EMA(random_model(), exponential(0.5))
    ema.model.classes = tuple("abcde")
    monkeypatch.setattr(averages, "is_sharded", lambda _: True)
    parts = ema.parts(here=True)
    with Draws() as drawn:
        model = ema.assembled(dict(parts))
    assert drawn.numbers == 0
    assert model is not ema.model
    assert model.classes == ema.model.classes
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, ema.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.backbone.transformer.rotary, ema.model.backbone.transformer.rotary)
    ema.model.backbone.next_position.zero_()  # as training would
    assert model.backbone.next_position.any()
    del parts["backbone.next_position"]
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone\.next_position"):
        ema.assembled(parts)


def age(folder, old):
    """Rewrite a checkpoint or model as format 1 had it: sizes in its manifest, and no digests."""
    change(folder / "config.json", format=1, sha256=None)
    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        new = "condition.embedding."
        renamed = {name.replace(new, old): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        with file.open("rb") as stream:  # torch's checkpoints keep names in the file's own metadata too
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        known = header.get("__metadata__")
        metadata = known and {key: value.replace(new, old) for key, value in known.items()}
        save_file(renamed, file, metadata=metadata)
    state = folder / "state.json"
    if state.exists():
        sizes = json.loads(state.read_text())["sizes"]
        sizes = {name: (folder / name).stat().st_size for name in sizes}
        change(state, sizes=sizes, sha256=None, unlogged=None)


@pytest.mark.parametrize(("recipe", "old"), [("tiny", "backbone.class_embedding."), ("tiny:jit", "class_embedding.")])
def test_run_of_format_1_resumes_bitwise(recipe, old, tmp_path):
    """Two steps, aged, and two more are the four steps of one run: weights, average, optimizer."""
    config = tiny("train.steps=4", "train.checkpoint_every=2", recipe=recipe)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(config, whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    age(resumed / "checkpoints" / "step-00000002", old)
    assert train(config, resumed).new_steps == 2
    assert_same(whole, resumed)


def test_model_of_format_1_loads(tmp_path):
    model = random_model()
    age(pra.save(model, tmp_path / "model"), "backbone.class_embedding.")
    assert same_weights(pra.load(tmp_path / "model"), model)


@pytest.mark.parametrize("name", ["learned", *JITS])
def test_saved_model_loads_as_it_was(name, tmp_path):
    model = MODELS[name]()
    model.sampling, model.classes = SamplingConfig(guidance=2.0, steps=4), tuple("zyxwv")
    folder = pra.save(model, tmp_path / "new" / "model")
    assert contents(folder).keys() == {"config.json", "model.safetensors"}
    back = pra.load(folder)
    assert type(back) is type(model)
    assert (back.config, back.sampling, back.classes) == (model.config, model.sampling, model.classes)
    assert same_weights(back, model)
    assert not back.training
    asked = [0, 4, 2], [10, 11, 12]
    assert torch.equal(pra.Sampler(back).sample(*asked), pra.Sampler(model).sample(*asked))
    half = pra.load(pra.save(model.to(torch.bfloat16), tmp_path / "half"))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert same_weights(half.to(torch.bfloat16), model)


def same_weights(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(u, v) for (x, u), (y, v) in pairs)


def test_model_in_a_folder_that_is_not_utf8_loads(tmp_path):
    model, folder = random_model(), tmp_path / "r\udce9un"
    folder.mkdir()
    weights.write_model(model, folder)
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_load_takes_a_run_a_checkpoint_or_a_model(trained, tmp_path):
    model, newest = pra.load(trained), trained / "checkpoints" / "step-00000020"
    assert same_weights(model, pra.load(newest))
    assert not same_weights(model, pra.load(trained / "checkpoints" / "step-00000010"))
    raw = pra.load(trained, average="raw")
    assert not same_weights(model, raw)
    assert torch.equal(load_file(newest / weights.MODEL)["auxiliary.weight"], raw.auxiliary.weight)
    assert (model.sampling, model.classes) == (pra.recipe("tiny").sampling, tuple("0123456789"))
    saved = pra.save(model, tmp_path / "saved")
    assert same_weights(pra.load(saved), model)
    assert same_weights(pra.load(saved, average="raw"), model)
    kinds = {path.suffix for path in trained.rglob("*.*") if "tfevents" not in path.name}
    assert kinds == {".json", ".jsonl", ".png", ".safetensors"}  # no pickle


def test_load_of_something_else_is_refused(run, tmp_path):
    for path in (tmp_path / "nothing", run / "config.json", run / "samples"):
        refused(lambda path=path: pra.load(path), code="missing", path=path)
    before = contents(run)
    refused(lambda: pra.save(pra.load(run), run), code="exists", path=run)
    assert contents(run) == before
    shutil.rmtree(run / "checkpoints")
    refused(lambda: pra.load(run), "pra train", code="missing", path=run)
    (run / "checkpoints").write_text("")
    refused(lambda: pra.load(run), "Not a directory", code="unreadable", path=run / "checkpoints")


def test_weights_of_another_model_are_refused(tmp_path):
    for name, config in (("model", LEARNED), ("other", dataclasses.replace(LEARNED, class_tokens=2))):
        pra.save(random_model(config), tmp_path / name)
    file = tmp_path / "model" / weights.MODEL
    shutil.copy(tmp_path / "other" / weights.MODEL, file)
    change(tmp_path / "model" / "config.json", sha256=None)
    refused(lambda: pra.load(tmp_path / "model"), "6x96", "6x64", code="mismatch", path=file)
    model = random_model()
    model.codec.decoder.out = torch.nn.Sequential(model.codec.decoder.out, torch.nn.Tanh())
    refused(lambda: pra.save(model, tmp_path / "new"), "codec.decoder.out.weight is missing", code="unsupported")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("format", 3, "install a newer pra"),
        ("format", None, "is of format None"),
        ("model", None, "expected the fields of ModelConfig"),
        ("model", {"channels": 1}, "missing"),
        ("sampling", {"guidanse": 1.0}, "did you mean 'guidance'"),
        ("sampling", {"solver": "eular"}, "did you mean 'euler'"),
        ("classes", ["0", "1"], "does not name the 5 classes"),
        ("classes", 3, "does not name the 5 classes"),
    ],
)
def test_damaged_config_is_refused(tmp_path, key, value, part):
    folder = pra.save(random_model(), tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: value}))
    refused(lambda: pra.load(folder), part)


def test_sizes_of_a_strangers_model_take_no_memory(tmp_path):
    folder = pra.save(random_model(), tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    for name, changes, part in (
        ("", {"num_classes": 10**6}, "does not name the 1000000 classes"),
        ("", {"num_classes": 10**9}, "num_classes must lie in"),
        ("", {"class_tokens": 10**6}, "condition.embedding.weight is"),
        ("", {"class_tokens": 10**12}, "class_tokens must lie in"),
        ("", {"image_size": [10**6] * 2, "patch_size": 10**5 * 5, "channels": 10**6}, "cannot be built"),
        ("backbone", {"depth": 10**9}, "depth must lie in [1, 1000]"),
        ("backbone", {"width": 2**18, "heads": 2**10}, "in the model"),
        ("backbone", {"width": 2**40, "heads": 2**30}, "width must lie in"),
    ):
        model = json.loads(json.dumps(values["model"]))
        (model[name] if name else model).update(changes)
        (folder / "config.json").write_text(json.dumps(values | {"model": model}))
        refused(lambda: pra.load(folder), part)


def test_truncated_files_and_pickles_are_refused(tmp_path):
    folder = pra.save(random_model(), tmp_path / "model")
    (folder / "model.pt").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    pra.load(folder)
    whole = contents(folder)
    cuts = [whole[weights.MODEL][:length] for length in (0, 4, 8, 100, -1)]
    for name, damaged in (
        (weights.MODEL, [*cuts, whole["model.pt"]]),
        ("config.json", [b"", b"{", b"[]", b"\xff\xfe", b"null"]),
    ):
        for data in damaged:
            (folder / name).write_bytes(data)
            refused(lambda: pra.load(folder), code="unreadable", path=folder / name)
        (folder / name).write_bytes(whole[name])
    assert not Path("owned").exists()


def test_saved_weights_have_the_permissions_of_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        pra.save(random_model(), tmp_path / "saved")
    finally:
        os.umask(mask)
    files = (tmp_path / "saved").iterdir()
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {
        "config.json": 0o640, "model.safetensors": 0o640
    }  # fmt: skip


@pytest.mark.parametrize("size", [100, 4096, 100_000])
def test_save_on_a_full_disk_leaves_nothing(tmp_path, full_disk, size):
    """The configuration, the first and a later block of the weights do not fit."""
    with full_disk(size):
        refused(lambda: pra.save(random_model(), tmp_path / "x"), code="unwritable", path=tmp_path / "x")
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(OSError, match="File too large") as raised:
            weights.write_tensors({"a": torch.zeros(100_000)}, tmp_path / "a.safetensors")
    assert raised.value.errno == errno.EFBIG


SHARD = "optimizer/shard-00001-model-00001-of-00001.safetensors"
STATES = {
    '{"step"': "state.json is not JSON",
    "[]": "state.json holds list",
    '{"step": 20}': "sizes: expected dict",
    '{"step": 20, "sizes": [1]}': "sizes: expected dict",
    "{}": "step: expected int",
    '{"step": "x", "sizes": {}}': "step: expected int",
    '{"step": -7, "sizes": {}}': "step must lie in",
    '{"step": 1e999, "sizes": {}}': "step: expected int",
    "[" * 100_000 + "]" * 100_000: "nests deeper",
}
STATES |= {json.dumps({"step": 20, "sizes": {name: 3}}): "is missing" for name in ("a\0b", "a" * 5000)}


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        *((name, None, "bytes of") for name in (weights.MODEL, "ema.safetensors", SHARD)),
        ("config.json", '{"format', "config.json is no"),
        ("ema.safetensors", "", "0 bytes"),
        *(("state.json", text, fault) for text, fault in STATES.items()),
    ],
)
def test_damaged_checkpoint_is_passed_over(run, name, data, fault):
    file = run / "checkpoints" / "step-00000020" / name
    file.write_bytes(file.read_bytes()[:-1] if data is None else data.encode())
    with pytest.warns(UserWarning, match=f"step-00000020 is damaged .*{fault}.*step-00000010, is used"):
        assert weights.newest_checkpoint(run) == run / "checkpoints" / "step-00000010"


def test_changed_content_is_passed_over(run):
    """Every reader of the changed file takes the checkpoint before it."""
    newest, before = (run / "checkpoints" / f"step-{step:08d}" for step in (20, 10))
    changes = (
        ("ema.safetensors", flip, {"ema"}),
        (weights.MODEL, flip, {"raw"}),
        (SHARD, flip, set()),
        ("config.json", lambda file: change(file, classes=list("0123456798")), {"ema", "raw"}),
        ("state.json", lambda file: change(file, step=19), {"ema", "raw"}),
    )
    for name, damage, readers in changes:
        good = (newest / name).read_bytes()
        damage(newest / name)
        for average in {"ema", "raw"} - readers:
            assert weights.newest_checkpoint(run, average) == newest
        for average in (*readers, None):
            with pytest.warns(UserWarning, match=f"content of {name} is not what was saved.*step-00000010, is used"):
                assert weights.newest_checkpoint(run, average) == before
        if "ema" in readers:
            refused(lambda: pra.load(newest), "another checkpoint", code="unreadable", path=newest / name)
        (newest / name).write_bytes(good)
    assert weights.newest_checkpoint(run, None) == newest


def test_changed_weights_of_a_saved_model_are_refused(tmp_path):
    folder = pra.save(random_model(), tmp_path / "model")
    change(folder / "config.json", sampling={"guidance": 2.0})  # anyone may recommend other settings
    assert pra.load(folder).sampling.guidance == 2.0
    flip(folder / weights.MODEL)
    refused(lambda: pra.load(folder), "remove sha256 from", code="unreadable", path=folder / weights.MODEL)
    change(folder / "config.json", sha256=None)
    pra.load(folder)


@pytest.mark.parametrize("digests", [True, False])
def test_json_in_another_layout_is_the_same_content(run, digests):
    for folder in weights.checkpoints(run):
        for name in ("state.json", "config.json"):
            text = json.dumps(json.loads((folder / name).read_text()), indent=4).replace(".0,", ",")
            (folder / name).write_bytes(b"\r\n".join(text.encode().split(b"\n")))
        if not digests:
            change(folder / "state.json", sha256=None)
    assert weights.newest_checkpoint(run, None) == run / "checkpoints" / "step-00000020"
    assert train(tiny("train.steps=21"), run).new_steps == 1


def test_run_without_a_whole_checkpoint_is_refused(run):
    previous = pra.load(run / "checkpoints" / "step-00000010")
    (run / "checkpoints" / "step-00000020" / "ema.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"ema.safetensors is missing"):
        assert same_weights(pra.load(run), previous)
    (run / "checkpoints" / "step-00000010" / "state.json").unlink()
    refused(lambda: pra.load(run), "step-00000010", "step-00000020", code="unreadable", path=run)
    assert weights.last_good(run) == "there is no earlier checkpoint"


def test_checkpoint_that_is_removed_meanwhile_is_no_error(run, monkeypatch):
    newest, before = (run / "checkpoints" / f"step-{step:08d}" for step in (20, 10))
    expected, read = pra.load(before), weights.read_config

    def read_late(folder):
        if folder == newest:
            (newest / "ema.safetensors").unlink()  # as in rmtree
        return read(folder)

    monkeypatch.setattr(weights, "read_config", read_late)
    with pytest.warns(UserWarning, match="ema.safetensors is missing"):
        assert same_weights(pra.load(run), expected)
    refused(lambda: pra.load(newest), "no average 'ema'", code="unknown", path=newest)


def test_closed_folder_of_checkpoints_is_not_empty(run, monkeypatch):
    listdir, folder = os.listdir, run / "checkpoints"

    def refuse(path="."):  # root may list every folder
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    refused(lambda: pra.load(run), "Permission denied", code="unreadable", path=folder)
    assert weights.last_good(run) == "the earlier checkpoints cannot be read"
    metrics = (run / "metrics.jsonl").read_bytes()
    refused(lambda: train(tiny("train.steps=30"), run), code="unreadable", path=folder)
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_special_files_in_a_checkpoint_are_refused(run):
    folder = run / "checkpoints" / "step-00000020"
    state = json.loads((folder / "state.json").read_text()) | {"sizes": {}}
    (folder / "state.json").write_text(json.dumps({"step": state["step"], "sizes": {}}))
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        for name in ("ema.safetensors", SHARD, "config.json"):
            (folder / name).rename(folder / "kept")
            make(folder / name)
            do = (lambda: train(tiny("train.steps=30"), run)) if name == SHARD else (lambda: pra.load(folder))
            refused(do, "not a regular file", code="unreadable")
            (folder / name).unlink()
            (folder / "kept").rename(folder / name)
