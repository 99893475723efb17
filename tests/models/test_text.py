"""Captions as conditions: rows, the tokens that a text becomes, and what is refused."""

import dataclasses
import pickle
import warnings

import numpy as np
import pytest
import torch
from support.captions import TEXT, WORDS
from support.models import CAPTIONED, CAPTIONS, LEARNED, batch, random_model
from support.refusal import refused

from pra.config import FrozenConfig
from pra.models.text import ByteRow, TextCondition, cut, hashed_ngrams

NASTY = (
    "<script>alert(1)</script>",
    "\u202e\u05e9\u05dc\u05d5\u05dd",
    "\x00\x1b[31m\n\t",
    "\ud800",
    "\N{PANDA FACE}" * 9,
    "../" * 9,
)


@pytest.fixture(scope="module")
def condition():
    return random_model(CAPTIONED).condition


def test_row_holds_class_bytes_and_padding():
    row = ByteRow(8)
    assert row(3, "a é").tolist() == [3, 97, 32, 0xC3, 0xA9, -1, -1, -1, -1]
    assert row(3, "").tolist() == [3, *[-1] * 8]
    assert pickle.loads(pickle.dumps(row))(0, "x").tolist() == row(0, "x").tolist()


def test_cut_ends_at_a_whole_character():
    assert [cut("aéé", length) for length in range(1, 6)] == ["a", "a", "aé", "aé", "aéé"]
    assert cut("e\u0301", 2) == "é"  # composed
    assert cut(" a \n b\t", 9) == "a b"


@pytest.mark.parametrize("text", NASTY)
def test_any_text_has_a_row_and_a_safe_file_name(condition, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = condition.parse(None, WORDS, [text])
        texts = condition.texts([text])
    assert rows.shape == (1, 17)
    assert condition(rows).isfinite().all()
    assert not set(condition.file_name(0, texts)) & set("/\\<>:\x00\n\x1b. ")


def test_ngrams_depend_on_their_own_bytes_alone():
    rows = torch.from_numpy(np.stack([ByteRow(16)(0, text) for text in ("red heart", "a red heart", "red hears")]))
    numbers = hashed_ngrams(rows[:, 1:], 3, 1000)
    assert torch.equal(numbers[0, 2:9], numbers[1, 4:11])  # wherever the three bytes stand
    assert torch.equal(numbers[0, :8], numbers[2, :8])
    assert numbers[0, 8] != numbers[2, 8]
    assert 0 <= numbers.min() <= numbers.max() < 1000
    assert not torch.equal(numbers, hashed_ngrams(rows[:, 1:], 5, 1000))


def test_ngrams_tell_words_apart_in_one_embedding():
    text = dataclasses.replace(TEXT, ngrams=64)
    condition = random_model(dataclasses.replace(CAPTIONED, text=text)).condition
    rows = condition.parse(None, WORDS, ["ab", "ba"])
    assert condition.embed(rows[:, 1:]).shape == (2, 16, TEXT.transformer.width)
    condition.letters.weight.data.zero_()
    assert not torch.equal(*condition.embed(rows[:, 1:]))
    frozen = FrozenConfig(name="x", width=2)
    refused(lambda: dataclasses.replace(text, frozen=frozen), "ngrams", code="conflict")


def test_empty_text_has_a_file_name_without_a_part(condition):
    assert [condition.file_name(place, ["a one", ""]) for place in (0, 1)] == ["0000-a-one", "0001"]


def test_tokens_depend_on_every_byte_in_both_directions(condition):
    row = torch.from_numpy(ByteRow(16)(1, "abcd"))[None]
    tokens = condition(row)
    assert tokens.shape == (1, 3 + TEXT.tokens, 32)
    for place in range(1, 5):
        other = row.clone()
        other[0, place] += 1
        changed = (condition(other) != tokens).any(dim=2)[0]
        assert changed.tolist() == [False] * 3 + [True] * TEXT.tokens  # the class's tokens stay


def test_tokens_do_not_depend_on_the_batch(condition):
    _, rows, _ = batch(CAPTIONED)
    together = condition(rows)
    for place in range(len(rows)):
        torch.testing.assert_close(condition(rows[place : place + 1])[0], together[place], atol=1e-6, rtol=1e-5)
    assert torch.pdist(together.flatten(1)).min() > 1e-2


def test_labels_are_rows_without_text(condition):
    labels = torch.tensor([0, 5, 2])
    rows = torch.from_numpy(np.stack([ByteRow(16)(int(label), "") for label in labels]))
    assert torch.equal(condition.rows(labels), rows)
    assert torch.equal(condition(labels), condition(rows))
    assert torch.equal(condition.null_like(labels), rows[1].expand(3, -1))


def test_drop_replaces_the_row_or_a_part_of_it(condition):
    rows = condition.parse([1] * 4, WORDS[:5], ["ab"] * 4)
    drawn = torch.tensor([0.05, 0.15, 0.25, 0.65])
    dropped = condition.drop(rows, drawn, 0.1)
    assert dropped[:, 0].tolist() == [5, 1, 5, 1]
    assert (dropped[:, 1] == -1).tolist() == [True, True, False, False]
    assert torch.equal(condition.drop(rows, drawn - 0.05, 0.0), rows)
    alone = TextCondition(1, 2, 8, TEXT)
    dropped = alone.drop(alone.parse([0] * 4, ["image"], ["ab"] * 4), drawn, 0.1)
    assert dropped[:, 0].tolist() == [1, 0, 0, 0]  # the only class and its text go together


def test_parse_takes_captions_labels_or_both(condition):
    row, classes = ByteRow(16), ("a", "b", "c", "d", "e")
    assert condition.parse(None, classes, "x").tolist() == [row(5, "x").tolist()]
    assert condition.parse("b", classes, "x").tolist() == [row(1, "x").tolist()]
    assert condition.parse([4], classes).tolist() == [row(4, "").tolist()]
    alone = TextCondition(1, 2, 8, TEXT)
    assert alone.parse(None, ["image"], ["x", ""])[:, 0].tolist() == [0, 1]  # no text: the null condition
    rows = alone.parse(None, ["image"], ["x", ""])
    assert torch.equal(alone.parse(rows, ["image"]), rows)


def test_parse_refuses_what_does_not_fit(condition):
    classes = ("a", "b", "c", "d", "e")
    refused(lambda: condition.parse(None, classes), "captions", code="missing")
    refused(lambda: condition.parse([0, 1], classes, ["x"]), "1 captions and 2 labels", code="mismatch")
    refused(lambda: condition.parse(None, classes, [3]), "captions must be texts, got 3")
    refused(lambda: condition.parse(torch.zeros(2, 4), classes), "(2, 4)", code="mismatch")
    plain = random_model(LEARNED).condition
    refused(lambda: plain.parse(None, classes, ["x"]), "reads no captions", code="unsupported")
    refused(lambda: plain.parse(None, classes), "no labels", code="missing")


def test_long_caption_is_cut_with_one_warning(condition):
    with pytest.warns(UserWarning, match=r"10000 bytes in UTF-8, and this model reads the first 16") as caught:
        rows = condition.parse(None, WORDS[:5], ["é" * 5000, "é" * 3000])
    assert len(caught) == 1
    assert rows[0, 1:].tolist() == [*"é".encode()] * 8


def test_captions_give_other_conditions():
    """The text reaches h of every patch in the model too."""
    model = random_model(CAPTIONED)
    images, rows, _ = batch(CAPTIONED)
    patches = model.patchify(images[:1].expand(3, -1, -1, -1))
    rows[:, 0] = 0
    h = model.conditions(rows, patches[:, :-1])
    assert torch.pdist(h.transpose(0, 1).flatten(2)[0]).min() > 1e-3
    assert len(set(CAPTIONS)) == 3
