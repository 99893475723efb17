"""Requests of visitors, and the pictures made for them row by row."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from support.models import CAPTIONED, LEARNED, random_jit, random_model
from support.refusal import refused

import pra
from pra.config import SamplingConfig, Solver
from pra.demo.generation import (
    EVERY_CLASS,
    LAST_SEED,
    LONGEST_CAPTION,
    MOST_PICTURES,
    OWN_STEPS,
    answer,
    class_number,
    sampling_of,
)
from pra.sampling import Engine


def test_request_beyond_the_limits_is_refused(asked):
    for field, name, limits, *values in (
        ("seed", "seed", f"0 to {LAST_SEED}", None, -1, LAST_SEED + 1, 0.5),
        ("count", "number of pictures", "1 to 16", 0, MOST_PICTURES + 1),
        ("guidance", "guidance", "0 to 10", float("nan"), 11),
        ("steps", "number of steps", "0 to 100", None, 101),
    ):
        for value in values:
            refused(lambda change={field: value}: asked(**change), limits, name=name)
    refused(lambda: asked(label=None), "no class is chosen")


def test_class_is_chosen_by_number_or_typed_name(exhibit):
    model = random_model(num_classes=12)
    model.classes = ("11", *map(str, range(2, 11)), "dog", "cat")
    for chosen, number in ((3, 3), (None, None), (" cat ", 11), ("11", 0), ("2", 1), ("0", 0), ("12", 12)):
        assert class_number(chosen, model) == number
    for typed in ("bird", "13", "-1", "9" * 5000, "cat" * 10**6, ""):
        refused(lambda typed=typed: class_number(typed, model))


def test_rows_appear_in_turn_and_equal_the_sampler_s(exhibit, asked):
    model = random_model()
    parts = [sheets[0] for sheets in answer([exhibit(model)], asked())]
    assert [part.pictures.shape[2] for part in parts] == [0, 2, 4, 6]
    assert [part.finished for part in parts] == [False, False, False, True]
    expected = pra.Sampler(model, replace(model.sampling, guidance=1.5, steps=2)).sample([1] * 3, [5, 6, 7])
    for part in parts:
        torch.testing.assert_close(part.pictures, expected[:, :, : part.pictures.shape[2]])
    assert parts[0].captions == ("1, seed 5", "1, seed 6", "1, seed 7")
    # Two models take turns with the same request.
    shown = [exhibit(model), exhibit(random_model(image_size=(10, 8)), "two")]
    steps = list(answer(shown, asked(label=EVERY_CLASS, count=7)))
    assert [tuple(sheet.pictures.shape[2] for sheet in sheets) for sheets in steps] == [
        (0, 0), (2, 2), (4, 4), (6, 6), (6, 8), (6, 10),
    ]  # fmt: skip
    assert [sheet.name for sheet in steps[-1]] == ["one", "two"]
    for sheet in steps[-1]:
        assert [caption.partition(",")[0] for caption in sheet.captions] == ["0", "1", "2", "3", "4", "0", "1"]


def test_each_model_takes_the_steps_it_has_learnt(exhibit, asked):
    learnt, distilled = random_model(), random_model(head=replace(LEARNED.head, shortcut=True))
    learnt.sampling = SamplingConfig(steps=3, times=(0.0, 0.2, 0.7, 1.0))
    distilled.sampling = SamplingConfig(solver=Solver.SHORTCUT, steps=4)

    def taken(steps):
        settings = [sampling_of(model, asked(steps=steps)) for model in (learnt, distilled)]
        return [(one.steps, one.times is None) for one in settings]

    assert taken(OWN_STEPS) == [(3, False), (4, True)]
    assert taken(3)[0] == (3, False)
    assert taken(4) == [(4, True), (4, True)]
    assert [taken(steps)[1][0] for steps in (1, 2, 5, 7, 100)] == [1, 2, 4, 8, 8]
    for steps, note in ((OWN_STEPS, ""), (4, ""), (10, "8 steps instead of 10: this model takes 1, 2, 4, 8")):
        *_, sheets = answer([exhibit(learnt), exhibit(distilled, "two")], asked(steps=steps, count=1))
        assert [sheet.error for sheet in sheets] == ["", ""]
        assert [sheet.note for sheet in sheets] == ["", note]


def test_captions_are_drawn_as_the_sampler_draws_them(exhibit, asked):
    model = random_model(CAPTIONED)
    sampler = pra.Sampler(model, replace(model.sampling, guidance=1.5, steps=2))
    for label, caption, labels, told in (
        (5, " a  cat ", None, "a cat"),
        (1, "a cat", [1] * 3, "1, a cat"),
        (1, " ", [1] * 3, "1"),
        (5, "", [5] * 3, "no class"),
    ):
        *_, (sheet,) = answer([exhibit(model)], asked(label=label, caption=caption))
        expected = sampler.sample(labels, [5, 6, 7], [caption] * 3)
        torch.testing.assert_close(sheet.pictures, expected)
        assert (sheet.captions[0], sheet.note, sheet.error) == (f"{told}, seed 5", "", "")
    keep = torch.rand(3, 2, 8) * 2 - 1
    *_, (sheet,) = answer([exhibit(model)], asked(label=5, caption="a cat"), [keep])
    kept = keep.expand(3, *keep.shape)
    streamed = sampler.stream(seeds=[5, 6, 7], keep=kept, captions=["a cat"] * 3)
    torch.testing.assert_close(sheet.pictures, [*streamed][-1])


def test_any_caption_is_drawn_escaped_and_cut(exhibit, asked):
    one = [exhibit(random_model(CAPTIONED, num_classes=1))]
    cut = "a caption has 10000 bytes in UTF-8, and this model reads the first 16"
    for caption, told, note in (
        ("x" * LONGEST_CAPTION, "x" * 16, cut),
        ("\N{PANDA FACE} on a walk", "\N{PANDA FACE} on a walk", ""),
        ("\u05d7\u05ea\u05d5\u05dc", "\u05d7\u05ea\u05d5\u05dc", ""),
        ("\u202e<b>\x00\x1b[1m\n\udce9", r"\u202e<b>\x00\x1b[1m ?", ""),
        (" \t\n", "no caption", ""),
    ):
        *_, (sheet,) = answer(one, asked(label=0, caption=caption, count=1))
        assert (sheet.captions, sheet.note, sheet.error) == ((f"{told}, seed 5",), note, "")
        assert sheet.finished
    wide = replace(CAPTIONED.text, max_length=4000)
    *_, (sheet,) = answer([exhibit(random_model(CAPTIONED, text=wide))], asked(label=5, caption="y" * 4000, count=1))
    assert sheet.captions == (f"{'y' * 200} ..., seed 5",)
    longer = "x" * (LONGEST_CAPTION + 1)
    refused(lambda: asked(caption=longer), "10,001", "at most 10,000", code="too-large", name="caption")


def test_class_and_caption_models_answer_together(exhibit, asked):
    both = [exhibit(), exhibit(random_model(CAPTIONED, num_classes=1), "reader")]
    *_, (classes, reader) = answer(both, asked(label=EVERY_CLASS, caption="a cat", count=2))
    assert classes.captions == ("0, seed 5", "1, seed 6")
    assert reader.captions == ("a cat, seed 5", "a cat, seed 6")
    assert (classes.note, reader.note) == ("this model does not read captions", "")
    assert classes.finished
    assert reader.finished


def test_visitors_share_engines_and_not_pictures(exhibit, asked, monkeypatch):
    made = []
    monkeypatch.setattr("pra.sampling.sampler.Engine", lambda *a: (made.append(a[2]), Engine(*a))[1])
    shown = [exhibit()]

    def pictures(request):
        return [*answer(shown, request)][-1][0].pictures

    first = pictures(asked())
    assert torch.equal(pictures(asked()), first)
    assert made == [3]
    *_, ((one,), (other,)) = zip(answer(shown, asked()), answer(shown, asked(seed=9)), strict=True)
    assert made == [3, 3]
    assert torch.equal(one.pictures, first)
    assert not torch.equal(other.pictures, first)
    wanted = [asked(seed=seed, guidance=scale) for seed in (5, 9) for scale in (1.0, 2.0)]
    alone = list(map(pictures, wanted))
    with ThreadPoolExecutor(4) as visitors:
        together = list(visitors.map(pictures, wanted * 2))
    assert all(torch.equal(a, b) for a, b in zip(together, alone * 2, strict=True))


def test_failing_model_does_not_stop_the_other(exhibit, asked, monkeypatch):
    keep = [torch.zeros(3, 2, 8), torch.zeros(3, 2, 8)]
    *_, (failed, whole) = answer([exhibit(random_jit(), "jit"), exhibit()], asked(), keep)
    assert "JiT cannot complete" in failed.error
    assert (failed.finished, whole.finished, whole.error) == (False, True, "")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        yield

    monkeypatch.setattr(pra.Sampler, "stream", full)
    *_, (sheet,) = answer([exhibit()], asked())
    assert sheet.error == "not enough memory for 3 pictures at once. Ask for fewer"


def test_completions_keep_the_rows_exactly(exhibit, asked):
    for rows in range(4):
        keep = torch.rand(3, 2 * rows, 8) * 2 - 1
        parts = [sheets[0] for sheets in answer([exhibit()], asked(), [keep])]
        assert [part.pictures.shape[2] for part in parts] == list(range(2 * rows, 7, 2))
        assert torch.equal(parts[-1].pictures[:, :, : 2 * rows], keep.expand(3, *keep.shape))
        assert {part.kept for part in parts} == {2 * rows}
