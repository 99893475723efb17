"""``pra eval`` and ``pra data`` on the command line: output and early refusals. More: tests/evaluation."""

from pathlib import Path

from support.files import contents


def test_grey_model_and_colour_reference_are_told(call, trained, pictures):
    """A reference of too few images stops the command behind it."""
    for mode, line in (
        ("RGB", "the reference folder:RGB has colour, and is converted to grey, like the images that are judged\n"),
        ("L", ""),
    ):
        reference = pictures(mode, mode=mode)
        answer = call("eval", trained, "--features", "classifier", "--reference", reference, "--num", "4")
        assert answer.out == line
        assert answer.is_refusal("a classifier needs")


def test_file_that_eval_cannot_write_is_refused(call, trained):
    for name in ("there.json", "there.npz"):
        Path(name).write_text("{}")
    before = contents(Path())
    for option, file, part in (
        ("--export-npz", "e.png", ".npz"),
        ("--export-statistics", "stats", ".npz"),
        ("--out", "there.json", "exists"),
        ("--export-npz", "there.npz", "exists"),
    ):
        answer = call("eval", trained, option, file)
        assert answer.is_refusal(file, part)
        assert answer.out == ""
        assert contents(Path()) == before


def test_pack_tells_what_comes_next(call, pictures):
    source = pictures("my pictures")
    answer = call("data", "pack", source, "my shards", "--workers", "0")
    assert answer.out.splitlines()[-1] == "next: pra train RECIPE --data 'wds:my shards'"
    assert call("data", "pack", source, "my shards").is_refusal("my shards")
