"""The command line: what it prints, what it writes, and what it says about bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.answer import Answer, Pra, caller
from support.files import contents
from torch import Tensor

import pra
from pra import cli
from pra.commands import options
from pra.commands.sampling_options import parse_labels
from pra.config import GuidanceSchedule, Solver
from pra.data import open_source
from pra.errors import PraError
from pra.training import callbacks
from pra.utils.pixels import GAP, from_uint8

# So they may, in twenty steps.
pytestmark = pytest.mark.filterwarnings("ignore:a state dimension varies little")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Pra:
    """``call("show", "tiny")``: the command, in this process and on the CPU, without curves (they take long)."""
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return caller(capsys)


def refused(answer: Answer, *parts: str) -> None:
    """Exit code 2 and one line that holds all ``parts``."""
    assert answer.code == 2
    assert len(answer.errors) == 1, answer.errors
    assert answer.errors[0].startswith("pra: error: ")
    for part in parts:
        assert part in answer.errors[0]


def picture(path: Path, width: int = 8, height: int = 8, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(len(path.name)).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


def real_digits(folder: Path, count: int) -> list[Path]:
    source = open_source("digits@test")
    paths = [folder / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        source.image(index).save(path)
    return paths


# --- help ---------------------------------------------------------------------------------------------------


def shown_options(text: str) -> set[str]:
    return set(re.findall(r"^. (--[a-z-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(call: Pra, command: str) -> None:
    code, text, errors = call(command, "--help")
    assert (code, errors) == (0, [])
    assert "None" not in text
    assert "--no-" not in text
    assert "default: False" not in text
    assert shown_options(text) == set(cli.option_names(command))


def test_help_shows_what_is_worth_knowing(call: Pra) -> None:
    text = " ".join(call("sample", "--help").out.split())
    assert "--solver euler|midpoint|heun|euler-maruyama" in text
    assert "--schedule constant|linear" in text
    assert "(default: all)" in text
    assert "by default the first of samples.png, samples-2.png, ... that is not there yet" in re.sub(
        r" │ │ +", " ", text
    )
    assert "--steps INT" in text
    assert re.search(r"IMAGE +Pictures of .* at least one\.", call("complete", "--help").out)


def test_commands_are_listed_with_what_they_do(call: Pra) -> None:
    code, text, _ = call("--help")
    assert code == 0
    assert all(command in text for command in cli.COMMANDS)
    assert "Train a recipe, or go on with a run." in text


def test_version(call: Pra, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "package_version", lambda name: "1.2.3")
    assert call("--version") == (0, "pra 1.2.3\n", [])
    monkeypatch.setattr(cli, "package_version", lambda name: None)
    assert call("--version") == (0, "pra (not installed)\n", [])


def test_no_command(call: Pra) -> None:
    refused(call(), "which command? Known: train, distill,", "see `pra --help`")


def test_as_a_module() -> None:
    found = subprocess.run([sys.executable, "-m", "pra", "trian", "tiny"], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "did you mean 'train'?" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian", "tiny"], ["no command 'trian'; did you mean 'train'?"]),
        (["xyzzy"], [f"no command 'xyzzy'. Known: {', '.join(sorted(cli.COMMANDS))}"]),
        (["train", "tiny", "--stesp", "3"], ["pra train has no option '--stesp'; did you mean '--steps'?"]),
        (["train", "tiny", "--lr=3"], ["pra train has no option '--lr'"]),
        (["sample", "run", "--label", "3"], ["pra sample has no option '--label'; did you mean '--labels'?"]),
        (["sample", "run", "--solvr", "euler"], ["did you mean '--solver'?"]),
        (["sample", "run", "-n", "3"], ["pra sample has no option '-n'"]),
        (["sample", "run", "--averag", "raw"], ["did you mean '--average'?"]),
        (["show", "tiny", "--no-json"], ["did you mean '--json'?"]),
        (["train", "tinny"], ["no recipe 'tinny'; did you mean 'tiny'?"]),
        (["train", "tiny:exct"], ["no system 'exct'", "did you mean 'exact'?"]),
        (["show", "tinny"], ["no run at tinny", "no recipe 'tinny'; did you mean 'tiny'?"]),
    ],
)
def test_wrong_names_get_the_nearest_one(call: Pra, arguments: list[str], parts: list[str]) -> None:
    refused(call(*arguments), *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train"], ["pra train needs RECIPE, or --data folder:PHOTOS"]),
        (["complete"], ["pra complete needs RUN; see `pra complete --help`"]),
        (["complete", "--label", "3", "--average=raw"], ["pra complete needs RUN"]),
        (["probe", "--num=3"], ["pra probe needs RUN"]),
        (["complete", "run", "a.png"], ["pra complete needs --rows"]),
        (["sample", "run", "other"], ["pra sample takes [RUN] and no 'other'"]),
        (["train", "tiny", "--steps", "many"], ["pra train --steps needs a whole number, not 'many'"]),
        (["train", "tiny", "--steps=1.5"], ["pra train --steps needs a whole number, not '1.5'"]),
        (["sample", "run", "--guidance", "x"], ["pra sample --guidance needs a number, not 'x'"]),
        (["complete", "run", "a.png", "--rows", ""], ["pra complete --rows needs a whole number, not ''"]),
        (["sample", "run", "--batch_size", "x"], ["pra sample --batch-size needs a whole number"]),
        (["train", "tiny", "--steps"], ["pra train --steps needs a value; see `pra train --help`"]),
        (["sample", "run", "--labels", "--seeds", "0"], ["pra sample --labels needs a value"]),
    ],
)
def test_what_is_missing_or_no_number(call: Pra, arguments: list[str], parts: list[str]) -> None:
    refused(call(*arguments), *parts)


def test_of_several_processes_the_first_says_what_is_wrong_with_the_line(
    call: Pra, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        answer = call("trian", "tiny")
        assert (answer.code, len(answer.errors)) == (2, lines)
    monkeypatch.setenv("WORLD_SIZE", "1")  # then it is no matter what the rank is
    refused(call("trian", "tiny"), "did you mean 'train'?")


# --- show ---------------------------------------------------------------------------------------------------


def test_recipes_are_listed(call: Pra) -> None:
    code, text, _ = call("show")
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()] == list(pra.RECIPES)
    assert all(len(line.split()) > 3 for line in text.splitlines())


def test_show_as_json(call: Pra) -> None:
    code, text, _ = call("show", "tiny", "--json")
    assert code == 0
    report = json.loads(text)
    assert report["config"]["recipe"] == "tiny"
    parameters = report["parameters"]
    assert parameters["total"] == sum(p.numel() for p in pra.PRA(pra.recipe("tiny").model).parameters())
    assert parameters["total"] == sum(count for part, count in parameters.items() if part != "total")
    assert {"backbone", "head", "codec"} <= parameters.keys()
    sampling = report["flops_per_image"]["sampling"]
    assert sampling["total"] == sum(count for part, count in sampling.items() if part != "total")
    assert report["flops_per_image"]["training"] > 0


def test_show_for_a_person(call: Pra) -> None:
    code, text, _ = call("show", "digits:states")
    assert code == 0
    assert re.search(r"^recipe +digits:states$", text, re.MULTILINE)
    assert re.search(r"^ +image_size +8 x 8$", text, re.MULTILINE)
    assert re.search(r"^ +total +0\.\d+ M$", text, re.MULTILINE)


def test_show_a_run(call: Pra, trained: Path) -> None:
    report = json.loads(call("show", trained, "--json").out)
    assert report["config"] == json.loads((trained / "config.json").read_text())


def test_show_what_is_no_run(call: Pra, trained: Path, tmp_path: Path) -> None:
    refused(call("show", tmp_path), "it holds no config.json")
    saved = pra.save(pra.load(trained), tmp_path / "saved")
    refused(call("show", saved), f"{saved} holds a model, not a run")
    (tmp_path / "config.json").write_text('{"recipe": ')
    refused(call("show", tmp_path), "config.json is no JSON: Expecting value")


def test_a_recipe_is_not_hidden_by_a_folder_of_its_name(
    call: Pra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert call("show", "tiny").code == 0


# --- labels and seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"), [("0", [0]), ("0,3", [0, 3]), ("2-4", [2, 3, 4]), (" 1 , 5-6,0", [1, 5, 6, 0]), ("7-7", [7])]
)
def test_numbers(text: str, numbers: list[int]) -> None:
    assert options.parse_numbers(text, "--seeds") == numbers


@pytest.mark.parametrize("text", ["", "a", "-1", "1-", "3-1", "1,,2", "1.5", "1-2-3", str(2**63), "٣x"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(PraError, match=r"--seeds '"):
        options.parse_numbers(text, "--seeds")


def test_labels() -> None:
    classes = ("cat", "dog", "fire engine", "x-ray")
    assert parse_labels("all", classes) == [0, 1, 2, 3]
    assert parse_labels("dog,0, fire engine ,2-3,x-ray", classes) == [1, 0, 2, 2, 3, 3]
    for text, part in (("4", "label 4 is out of range"), ("1-9", "label 4 is"), ("dgo", "did you mean 'dog'?")):
        with pytest.raises(PraError, match=re.escape(part)):
            parse_labels(text, classes)


def test_classes_named_by_numbers() -> None:
    """As folders sort them. The name comes first, and says so where the number means another class."""
    classes = ("0", "1", "10", "2")
    assert parse_labels("0,1,3,10", classes) == [0, 1, 3, 2]  # no class is named 3, none has the number 10
    with pytest.warns(UserWarning, match=r"label 2 is .* named '2', which is number 3; .* 2 is named '10', and 2-2 me"):
        assert parse_labels("2", classes) == [3]
    assert parse_labels("2-2", classes) == [2]


def test_the_help_says_which_class_a_number_means(call: Pra) -> None:
    text = re.sub(r"[\s│]+", " ", call("sample", "--help").out)
    assert "Where classes are named by numbers, 2 is the one of that name and 2-2 the one of that number." in text


# --- sample -------------------------------------------------------------------------------------------------


def sampled(call: Pra, run: Path, out: Path, *options: object) -> np.ndarray:
    assert call("sample", run, "--out", out, *options).code == 0
    with np.load(out) as arrays:
        return np.asarray(arrays["arr_0"])


def test_sample_to_a_grid(call: Pra, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.png"
    code, text, _ = call("sample", trained, "--labels", "3,7", "--seeds", "0-4", "--out", out)
    assert code == 0
    assert f"10 images (2 labels x 5 seeds): {out}" in text
    with Image.open(out) as grid:
        assert grid.size == (5 * (64 + GAP) + GAP, 2 * (64 + GAP) + GAP)


def test_sample_to_arrays_is_the_sampler(call: Pra, trained: Path, tmp_path: Path) -> None:
    pixels = sampled(call, trained, tmp_path / "a.npz", "--labels", "3,7", "--seeds", "0-1")
    expected = pra.Sampler(pra.load(trained)).sample([3, 3, 7, 7], [0, 1, 0, 1])
    assert np.array_equal(pixels, pra.to_uint8(expected).permute(0, 2, 3, 1))
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_1"].tolist() == [3, 3, 7, 7]


def test_sample_to_a_folder(call: Pra, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "guidance-1.5"
    assert call("sample", trained, "--labels", "3", "--seeds", "0,9", "--out", f"{out}/").code == 0
    assert sorted(path.name for path in out.iterdir()) == ["0003-3-seed000000.png", "0003-3-seed000009.png"]
    with Image.open(out / "0003-3-seed000009.png") as one:
        expected = pra.Sampler(pra.load(trained)).sample([3], [9])[0]
        assert np.abs(np.asarray(one, int) - pra.to_uint8(expected)[0].numpy()).max() <= 1


def test_no_image_depends_on_its_batch(call: Pra, trained: Path, tmp_path: Path) -> None:
    whole = sampled(call, trained, tmp_path / "a.npz", "--seeds", "0-1").astype(int)
    parts = sampled(call, trained, tmp_path / "b.npz", "--seeds", "0-1", "--batch-size", "3").astype(int)
    assert whole.shape == (20, 8, 8, 1)
    assert np.abs(whole - parts).max() <= 1


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        *((["--solver", solver.value], {"solver": solver}) for solver in Solver if solver is not Solver.SHORTCUT),
        *((["--schedule", schedule.value, "--guidance", "3"], {"schedule": schedule}) for schedule in GuidanceSchedule),
        (["--steps=1", "--temperature=0.5"], {"steps": 1, "temperature": 0.5}),
        (["--guidance", "1"], {"guidance": 1.0}),
        ([], {}),
    ],
)
def test_sampling_options(
    call: Pra, trained: Path, tmp_path: Path, options: list[str], changes: dict[str, object]
) -> None:
    model = pra.load(trained)
    recommended = {name: getattr(model.sampling, name) for name in ("guidance", "schedule", "solver", "steps")}
    settings = recommended | ({"guidance": 3.0} if "3" in options else {}) | changes
    expected = pra.Sampler(model, type(model.sampling)(**settings)).sample([2], [5])
    found = sampled(call, trained, tmp_path / "a.npz", "--labels", "2", "--seeds", "5", *options)
    assert np.array_equal(found[0, :, :, 0], pra.to_uint8(expected)[0, 0])


def test_raw_weights(call: Pra, trained: Path, tmp_path: Path) -> None:
    expected = pra.Sampler(pra.load(trained, average="raw")).sample([2], [5])
    found = sampled(call, trained, tmp_path / "a.npz", "--labels", "2", "--seeds", "5", "--average", "raw")
    assert np.array_equal(found[0, :, :, 0], pra.to_uint8(expected)[0, 0])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--labels", "12"], ["label 12 is out of range", "0 to 9"]),
        (["--labels", "cat"], ["no class 'cat'", "Known: 0, 1"]),
        (["--seeds", "5-1"], ["--seeds '5-1'", "write 0,3 or 0-15"]),
        (["--solver", "eulr"], ["'eulr' is unknown; did you mean 'euler'?"]),
        (["--schedule", "LINEAR"], ["'LINEAR' is unknown", "constant, linear"]),
        (["--steps", "0"], ["sampling: steps must be positive"]),
        (["--steps", "1" + 21 * "0"], ["sampling: steps must lie in [1, 10000]"]),
        (["--guidance", "nan"], ["guidance must lie in"]),
        (["--temperature", "-1"], ["temperature must lie in"]),
        (["--batch-size", "0"], ["--batch-size 0 must be at least 1"]),
        (["--device", "gpu"], ["device 'gpu' cannot be used", "leave it out"]),
    ],
)
def test_bad_sampling_options(call: Pra, trained: Path, tmp_path: Path, options: list[str], parts: list[str]) -> None:
    refused(call("sample", trained, "--out", tmp_path / "a.png", *options), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["sample", "complete"])
def test_images_that_are_not_finite_are_not_written(call: Pra, trained: Path, tmp_path: Path, command: str) -> None:
    own = ["--labels", "3"] if command == "sample" else [*real_digits(tmp_path, 1), "--rows", "1", "--label", "3"]
    out = tmp_path / "a.png"
    answer = call(command, trained, *own, "--seeds", "0,1", "--guidance", "1e300", "--out", out)
    refused(answer, "2 of 2 images are not finite numbers", "guidance nearer to 1 (now 1e+300)")
    assert not out.exists()


@pytest.mark.parametrize("command", ["sample", "complete"])
def test_output_is_never_overwritten(call: Pra, trained: Path, tmp_path: Path, command: str) -> None:
    arguments = [command, trained] if command == "sample" else [command, trained, picture(tmp_path / "x.png"), "--rows"]
    arguments += ["--labels", "0"] if command == "sample" else ["1"]
    (tmp_path / "taken.png").write_text("mine")
    (tmp_path / "taken").mkdir()
    refused(call(*arguments, "--out", tmp_path / "taken.png"), "taken.png exists already; choose another --out")
    refused(call(*arguments, "--out", tmp_path / "taken"), "taken exists already")
    refused(call(*arguments, "--out", tmp_path / "a.jpg"), "unknown ending '.jpg'")
    refused(call(*arguments, "--out", tmp_path / "taken.png" / "b.png"), "taken.png is a file")
    assert (tmp_path / "taken.png").read_text() == "mine"


def test_runs_that_cannot_be_sampled(call: Pra, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    refused(call("sample", tmp_path / "nothing", "--out", out), "the folder does not exist")
    refused(call("sample", run / "samples", "--out", out), "neither a run nor a model")
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    refused(call("sample", run, "--out", out), "no checkpoint of", "is whole", "step-00000010", "step-00000020")
    shutil.rmtree(run / "checkpoints")
    refused(call("sample", run, "--out", out), "has no checkpoint yet; let `pra train` reach its first one")
    assert not out.exists()


@pytest.mark.filterwarnings("default:checkpoint .* is damaged")
def test_a_damaged_checkpoint_is_passed_over_and_it_says_so(call: Pra, run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "step-00000020" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    code, _, errors = call("sample", run, "--labels", "0", "--out", tmp_path / "a.png")
    assert code == 0
    assert len(errors) == 1
    assert re.fullmatch(r"pra: warning: checkpoint .*step-00000020 is damaged .*step-00000010, is used", errors[0])
    code, _, errors = call("train", "tiny", "--run-dir", run, "--set", "train.sample_every=0")
    assert code == 0
    assert "step-00000010, is used" in errors[0]


# --- complete -----------------------------------------------------------------------------------------------


def kept(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).copy())


def test_complete_one_image_once(call: Pra, trained: Path, tmp_path: Path) -> None:
    (image,) = real_digits(tmp_path, 1)
    out = tmp_path / "out.png"
    code, text, _ = call("complete", trained, image, "--rows", "2", "--seeds", "3", "--out", out)
    assert code == 0
    assert f"1 images continued from 2 of 4 rows, 1 times each: {out}" in text
    assert torch.equal(kept(out)[:4], kept(image)[:4])
    assert not torch.equal(kept(out)[4:], kept(image)[4:])


def test_complete_to_a_grid(call: Pra, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.PNG"
    assert call("complete", trained, *real_digits(tmp_path, 3), "--rows", "1", "--seeds", "0-3", "--out", out).code == 0
    with Image.open(out) as grid:
        assert grid.size == (6 * (64 + GAP) + GAP, 3 * (64 + GAP) + GAP)


def test_complete_with_a_label_each(call: Pra, trained: Path, tmp_path: Path) -> None:
    """Two images, two labels: each image is continued as with its own label alone."""
    paths = real_digits(tmp_path, 2)
    arrays = {}
    for name, pictures, label in (("both", paths, "3,7"), ("a", paths[:1], "3"), ("b", paths[1:], "7")):
        out = tmp_path / f"{name}.npz"
        done = call("complete", trained, *pictures, "--rows", "1", "--seeds", "0,1", "--label", label, "--out", out)
        assert done.code == 0, done.err
        arrays[name] = np.load(out)
    assert arrays["both"]["arr_1"].tolist() == [3, 3, 7, 7]
    apart = np.concatenate([arrays["a"]["arr_0"], arrays["b"]["arr_0"]]).astype(int)
    assert np.abs(arrays["both"]["arr_0"] - apart).max() <= 1  # rounding of batched arithmetic


def test_complete_to_arrays_and_folders(call: Pra, trained: Path, tmp_path: Path) -> None:
    first, second = real_digits(tmp_path, 2)
    same_name = tmp_path / "elsewhere" / first.name
    same_name.parent.mkdir()
    shutil.copy(second, same_name)
    arguments = ["complete", trained, first, same_name, "--rows", "1", "--seeds", "0,2", "--label", "4"]
    assert call(*arguments, "--out", tmp_path / "out.npz").code == 0
    assert call(*arguments, "--out", tmp_path / "out").code == 0
    names = [f"{place:04d}-0-seed{seed:06d}.png" for place in (0, 1) for seed in (0, 2)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    real = torch.stack([from_uint8(kept(path))[None] for path in (first, first, second, second)])
    expected = pra.Sampler(pra.load(trained)).complete(real, 1, [4] * 4, [0, 2, 0, 2])
    with np.load(tmp_path / "out.npz") as arrays:
        assert np.array_equal(arrays["arr_0"][..., 0], pra.to_uint8(expected)[:, 0])
        assert arrays["arr_1"].tolist() == [4] * 4
        for name, pixels in zip(names, arrays["arr_0"], strict=True):
            assert np.array_equal(kept(tmp_path / "out" / name), pixels[..., 0])


def test_all_rows_are_the_image_itself(call: Pra, trained: Path, tmp_path: Path) -> None:
    (image,) = real_digits(tmp_path, 1)
    assert call("complete", trained, image, "--rows", "4", "--seeds", "0", "--out", tmp_path / "out.png").code == 0
    assert torch.equal(kept(tmp_path / "out.png"), kept(image))


def test_palettes_and_black_and_white_are_converted(call: Pra, trained: Path, tmp_path: Path) -> None:
    image = picture(tmp_path / "bw.png", mode="1")
    assert call("complete", trained, image, "--rows", "4", "--seeds", "0", "--out", tmp_path / "out.png").code == 0
    assert torch.equal(kept(tmp_path / "out.png"), kept(image) * torch.tensor(255, dtype=torch.uint8))
    refused(call("complete", trained, picture(tmp_path / "p.png", mode="P"), "--rows", "1"), "3 channels (RGB)")


@pytest.mark.parametrize(
    ("name", "size", "mode", "parts"),
    [
        ("wide.png", (9, 8), "L", ["wide.png is 9x8 (width x height)", "pictures of 8x8 with 1 (L)", "resize"]),
        ("colour.png", (8, 8), "RGB", ["colour.png is 8x8", "3 channels (RGB)", "convert it first"]),
        ("print.tif", (8, 8), "CMYK", ["4 channels (CMYK)"]),
        ("deep.png", (8, 8), "I;16", ["(I;16)"]),
        ("float.tif", (8, 8), "F", ["(F)"]),
    ],
)
def test_images_that_cannot_be_completed(
    call: Pra, trained: Path, tmp_path: Path, name: str, size: tuple[int, int], mode: str, parts: list[str]
) -> None:
    image = picture(tmp_path / name, *size, mode="L" if mode == "I;16" else mode)
    if mode == "I;16":
        Image.fromarray(np.zeros(size, np.uint16)).save(image)
    refused(call("complete", trained, image, "--rows", "1", "--out", tmp_path / "out.png"), *parts)
    assert not (tmp_path / "out.png").exists()


def test_files_that_are_no_pictures(call: Pra, trained: Path, tmp_path: Path) -> None:
    whole = picture(tmp_path / "whole.png").read_bytes()
    for name, data in (("text.png", b"hello"), ("empty.png", b""), ("cut.png", whole[:60])):
        (tmp_path / name).write_bytes(data)
        refused(call("complete", trained, tmp_path / name, "--rows", "1"), name, "cannot be read as a picture")
    refused(call("complete", trained, tmp_path / "missing.png", "--rows", "1"), "missing.png does not exist")
    refused(call("complete", trained, tmp_path, "--rows", "1"), f"{tmp_path} is a folder; give a picture")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--rows", "5"], ["rows 5 is out of range", "0 to 4"]),
        (["--rows", "-1"], ["rows -1 is out of range"]),
        (["--rows", "1", "--label", "1,2"], ["--label '1,2' means 2 classes for 1 images"]),
        (["--rows", "1", "--label", "10"], ["label 10 is out of range"]),
    ],
)
def test_bad_completions(call: Pra, trained: Path, tmp_path: Path, options: list[str], parts: list[str]) -> None:
    image = picture(tmp_path / "x.png")
    refused(call("complete", trained, image, *options, "--out", tmp_path / "out.png"), *parts)
    assert not (tmp_path / "out.png").exists()


def test_completing_needs_an_image(call: Pra, trained: Path) -> None:
    refused(call("complete", trained, "--rows", "1"), "no IMAGE given")


# --- train --------------------------------------------------------------------------------------------------


def pictures(folder: Path, count: int = 12, size: tuple[int, int] = (8, 8)) -> str:
    """A data source of two classes."""
    for index in range(count):
        picture(folder / ("cat", "dog")[index % 2] / f"{index}.png", *size)
    return f"folder:{folder}"


QUICK = ["--steps", "3", "--set", "train.sample_every=0"]


def test_train_and_what_comes_next(call: Pra, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, text, errors = call("train", "tiny", "--run-dir", run, "--data", pictures(tmp_path / "data"), *QUICK)
    assert (code, errors) == (0, [])
    assert "classes: 2 in folder:" in text
    assert "12 images from folder:" in text
    assert "trained 3 steps to 3 in " in text
    assert "corrupt" not in text
    assert text.splitlines()[-1] == f"next: pra sample {run}"
    assert pra.load(run).classes == ("cat", "dog")
    assert call("sample", run, "--labels", "dog", "--seeds", "0", "--out", tmp_path / "out").code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0001-dog-seed000000.png"]


def test_the_default_folder_is_named_after_the_recipe(
    call: Pra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("train", "tiny:states", *QUICK).code == 0
    assert pra.load("runs/tiny-states").classes == tuple("0123456789")


def test_options_and_settings_reach_the_configuration(call: Pra, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["train.optimizer.lr=1e-4", "train.rollout=Clean", "data.fit=random-crop", "train.batch_size=4"]
    options = [part for setting in settings for part in ("--set", setting)]
    assert call("train", "tiny", "--run-dir", run, "--seed", "7", *QUICK, *options).code == 0
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["optimizer"]["lr"] == 1e-4
    assert config["train"]["rollout"] == {"type": "Clean"}
    assert config["data"]["fit"] == "random-crop"
    assert (config["train"]["batch_size"], config["train"]["steps"], config["train"]["seed"]) == (4, 3, 7)


def test_more_steps_go_on_and_fewer_say_so(call: Pra, run: Path) -> None:
    before = contents(run)
    for steps in ("20", "7"):
        code, text, errors = call("train", "tiny", "--run-dir", run, "--steps", steps)
        assert (code, errors) == (0, [])
        assert f"nothing to train: the run has 20 steps already and {steps} are asked for" in text
        assert "a larger --steps goes on" in text
        assert contents(run) == before
    code, text, _ = call("train", "tiny", "--run-dir", run, "--steps", "22", "--set", "train.sample_every=0")
    assert code == 0
    assert f"run: {run} (goes on), " in text
    assert "trained 2 steps to 22 in " in text


def test_a_slip_in_the_run_s_folder_shows(call: Pra, tmp_path: Path) -> None:
    changes = ["--set", "train.sample_every=0"]
    code, text, _ = call("train", "tiny", "--run-dir", tmp_path / "slip", "--steps", "1", *changes)
    assert (code, f"run: {tmp_path / 'slip'} (new), " in text) == (0, True)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--data", "folder:nowhere"], ["nowhere does not exist"]),
        (["--data", "digit"], ["data source 'digit' is unknown; did you mean 'digits'?"]),
        (["--set", "model.patch_size=3"], ["image_size 8x8 is not divisible by patch_size 3"]),
        (["--set", "model.image_size=[9,8]"], ["image_size 9x8 is not divisible by patch_size 2"]),
        (["--set", "train.optimiser.lr=1"], ["no setting 'train.optimiser.lr'", "did you mean 'optimizer'?"]),
        (["--set", "train.optimizer.lr=fast"], ["train.optimizer.lr: expected float, got 'fast'"]),
        (["--set", "train.optimizer.lr=-1"], ["train.optimizer: lr must be positive and finite, got -1"]),
        (["--set", "train.batch_size"], ["--set 'train.batch_size' needs the form KEY=VALUE"]),
        (["--set", "train.micro_batch_size=3"], ["batch_size 8 is not divisible by micro_batch_size 3"]),
        (["--set", "train.objective.perceptual_weight=1"], ["at least 16x16 pixels, not 8x8"]),
        (["--steps", "0"], ["train: steps must be positive"]),
        (["--seed", "-1"], ["train: seed must lie in"]),
        (["--device", "meta"], ["device 'meta' cannot be used"]),
    ],
)
def test_bad_training_options(call: Pra, tmp_path: Path, options: list[str], parts: list[str]) -> None:
    refused(call("train", "tiny", "--run-dir", tmp_path / "run", *options), *parts)
    assert list(tmp_path.iterdir()) == []


def test_bad_data(call: Pra, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = ["train", "tiny", "--run-dir", tmp_path / "run", *QUICK]
    refused(call(*command, "--data", f"folder:{tmp_path / 'empty'}"), "empty holds no images")
    small = pictures(tmp_path / "small", size=(8, 7))
    refused(call(*command, "--data", small), "7x8 pixels", "smaller than the crop", "--set data.on_small=upscale")
    refused(call(*command, "--data", small, "--set", "data.workers=1"), "7x8 pixels", "smaller than the crop")
    data = pictures(tmp_path / "data")
    broken = tmp_path / "data" / "cat" / "4.png"
    broken.write_bytes(broken.read_bytes()[:60])
    refused(call(*command, "--data", data), str(broken), "cannot be decoded", "--set data.on_corrupt=skip")
    code, text, _ = call(*command, "--data", data, "--set", "data.on_corrupt=skip")
    assert code == 0
    assert re.search(r"^trained 3 steps to 3 in \d+ s, 2 corrupt images skipped$", text, re.MULTILINE)


def test_bad_run_folders(call: Pra, run: Path, tmp_path: Path) -> None:
    before = contents(run)
    command = ["train", "tiny", "--steps", "30", "--run-dir"]
    refused(
        call(*command, run, "--seed", "1", "--set", "train.batch_size=16"),
        "train.seed: 0 in the run, 1 asked for",
        "train.batch_size: 8 in the run, 16 asked for",
        "nothing was changed",
    )
    refused(call(*command, run / "config.json"), "config.json is a file")
    refused(call(*command, run / "config.json" / "x"), "cannot be written: Not a directory")
    refused(call(*command, run / "samples"), "is not empty and is not a run")
    assert contents(run) == before
    (run / "config.json").write_text("{}")
    refused(call(*command, run), "config.json names no recipe")


def test_a_folder_that_may_not_be_entered(call: Pra, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", closed)  # root may enter everywhere
    refused(call("show", "closed"), "closed/config.json is closed to you (Permission denied)")


def test_ctrl_c_while_nothing_is_to_be_saved(call: Pra, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "recipe_or_run", stop)
    assert call("show", "tiny") == (130, "", ["pra: interrupted"])
