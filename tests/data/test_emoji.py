"""The emoji source: on the real font where it is installed, and on small fonts made here."""

import io
import pickle
import re
import sys

import numpy as np
import pytest
from PIL import Image
from support.refusal import refused

import pra
from pra.config import DataConfig
from pra.data import emoji, load_images, open_source
from pra.utils.extras import install_command

ttLib = pytest.importorskip("fontTools.ttLib", reason="fontTools is in the extra 'emoji'")  # noqa: N816


# Glyph: the code point that has it, or None for those which only ligatures bring.
GLYPHS = {".notdef": None, "grin": 0x1F600, "man": 0x1F468, "dark": 0x1F3FF, "joiner": 0x200D, "laptop": 0x1F4BB}
GLYPHS |= {"heart": 0x2764, "three": ord("3"), "keycap": 0x20E3, "man_dark": None, "coder": None, "key_three": None}
GLYPHS |= {"kiss": 0x1F60D}  # the kiss is in the test split
LIGATURES = "sub man dark by man_dark; sub man joiner laptop by coder; sub three keycap by key_three;"
COLOURS = {"grin": (250, 200, 0), "man": (90, 60, 30), "man_dark": (40, 20, 10), "coder": (0, 0, 200)}
COLOURS |= {"kiss": (200, 0, 200), "heart": (250, 0, 0), "laptop": (90, 60, 30)}  # the laptop's drawing is the man's

LIST = """\
# emoji-test.txt
# Format: code points; status # emoji name
# group: Smileys & Emotion
1F600              ; fully-qualified     # x E1.0 grinning face
2764 FE0F          ; fully-qualified     # x E0.6 red heart
2764               ; unqualified         # x E0.6 red heart
1F60D              ; fully-qualified     # x E0.6 smiling face with heart-eyes
1F603              ; fully-qualified     # x E0.6 not in the font
# group: People & Body
1F468              ; fully-qualified     # x E0.6 man
1F468 1F3FF        ; fully-qualified     # x E1.0 man: dark skin tone
1F468 200D 1F4BB   ; fully-qualified     # x E4.0 man technologist
# group: Component
1F3FF              ; component           # x E1.0 dark skin tone
# group: Objects
1F4BB              ; fully-qualified     # x E0.6 laptop
# group: Symbols
0033 FE0F 20E3     ; fully-qualified     # x E0.6 keycap: 3
#EOF
"""


def png(colour, width=20, height=16):
    """A filled rectangle with one transparent column at its left."""
    image = Image.new("RGBA", (width, height), (*colour, 255))
    image.paste((0, 0, 0, 0), (0, 0, 1, height))
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def strike(pngs, ppem):
    """The locations and the data of one set of bitmaps."""
    from fontTools.misc.sstruct import getformat
    from fontTools.ttLib.tables import C_B_D_T_, E_B_L_C_, BitmapGlyphMetrics

    data, place, line = {}, E_B_L_C_.Strike(), E_B_L_C_.SbitLineMetrics()
    line.__dict__ |= dict.fromkeys(getformat(E_B_L_C_.sbitLineMetricsFormat)[1], 0)
    size = place.bitmapSizeTable
    size.hori = size.vert = line
    size.ppemX = size.ppemY = ppem
    size.bitDepth, size.flags = 32, 1
    size.colorRef = size.startGlyphIndex = size.endGlyphIndex = 0
    for name, content in pngs.items():
        bitmap = data[name] = C_B_D_T_.cbdt_bitmap_format_17(None, None)
        bitmap.metrics, bitmap.imageData = BitmapGlyphMetrics.SmallGlyphMetrics(), content
        bitmap.metrics.__dict__ |= dict.fromkeys(("height", "width", "BearingX", "BearingY", "Advance"), 10)
        index = E_B_L_C_.eblc_index_sub_table_1(None, None)  # of neighbouring glyphs: one for each
        index.indexFormat, index.imageFormat, index.names = 1, 17, [name]
        place.indexSubTables.append(index)
    return place, data


def save_font(path, strikes, ligatures=LIGATURES):
    """A font with bitmaps by their size, or with outlines alone."""
    from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
    from fontTools.fontBuilder import FontBuilder
    from fontTools.ttLib.tables._g_l_y_f import Glyph

    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(GLYPHS))
    builder.setupCharacterMap({code: name for name, code in GLYPHS.items() if code is not None})
    builder.setupGlyf({name: Glyph() for name in GLYPHS})
    builder.setupHorizontalMetrics(dict.fromkeys(GLYPHS, (1000, 0)))
    builder.setupHorizontalHeader()
    builder.setupPost()
    font = builder.font
    if ligatures:
        addOpenTypeFeaturesFromString(font, f"feature ccmp {{ {ligatures} }} ccmp;")
    if strikes:
        font["CBLC"], font["CBDT"] = ttLib.newTable("CBLC"), ttLib.newTable("CBDT")
        built = [strike(pngs, ppem) for ppem, pngs in strikes.items()]
        font["CBLC"].version = font["CBDT"].version = 3.0
        font["CBLC"].strikes, font["CBDT"].strikeData = [list(part) for part in zip(*built, strict=True)]
    font.save(path)
    return path


@pytest.fixture
def font(tmp_path):
    """The small font, ``emoji-test.txt`` beside it."""
    (tmp_path / "emoji-test.txt").write_text(LIST)
    return save_font(tmp_path / "small.ttf", {16: {name: png(colour) for name, colour in COLOURS.items()}})


def names(source):
    """The names in :meth:`where` of the images."""
    return [source.where(index).split(" (")[1].split(", U+")[0] for index in range(len(source))]


def test_emoji_small_font_is_read(font):
    source, held_out = open_source(f"emoji:{font}"), open_source(f"emoji:{font}@test")
    assert source.name == f"emoji:{font}"
    # A group counts only if one of its emoji is drawn for the first time.
    assert source.classes == held_out.classes == ("Smileys & Emotion", "People & Body")
    assert names(source) == ["grinning face", "red heart", "man", "man: dark skin tone", "man technologist"]
    assert names(held_out) == ["smiling face with heart-eyes"]
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    assert source.where(1) == f"image 1 (red heart, U+2764 U+FE0F) of emoji:{font}"
    colours = [source.image(index).getpixel((10, 10)) for index in range(5)]
    assert colours == [(*COLOURS[name], 255) for name in ("grin", "heart", "man", "man_dark", "coder")]
    image = source.image(0)  # 16 rows of 20, its first column transparent
    assert (image.size, image.mode) == ((20, 20), "RGBA")
    alpha = np.asarray(image)[..., 3]
    assert (alpha[2:18, 1:] == 255).all()
    assert alpha.sum() == 16 * 19 * 255


def test_emoji_fonts_of_other_kinds_are_read(font):
    save_font(font, {side: {"grin": png(COLOURS["grin"], width=side)} for side in (24, 48, 32)})
    assert open_source(f"emoji:{font}").image(0).size == (48, 48)
    save_font(font, {16: {name: png(colour) for name, colour in COLOURS.items()}}, ligatures="")
    assert names(open_source(f"emoji:{font}")) == ["grinning face", "red heart", "man"]


def test_emoji_missing_files_are_refused(tmp_path, font, monkeypatch):
    packages = "apt install fonts-noto-color-emoji unicode-data"
    refused(lambda: open_source("emoji:"), code="missing", name="emoji:")
    for path in (tmp_path / "x.ttf", tmp_path):
        refused(lambda path=path: open_source(f"emoji:{path}"), packages, code="missing", path=path)
    monkeypatch.setattr("pra.data.source.FONT", tmp_path / "none.ttf")
    refused(lambda: open_source("emoji"), "emoji:FONT.ttf", code="missing", path=tmp_path / "none.ttf")
    groups = tmp_path / "debian/emoji-test.txt"
    monkeypatch.setattr(emoji, "GROUPS", groups)
    (tmp_path / "emoji-test.txt").unlink()
    refused(lambda: open_source(f"emoji:{font}"), packages, code="missing", path=groups)
    groups.parent.mkdir()
    groups.write_text(LIST)
    assert len(open_source(f"emoji:{font}")) == 5
    monkeypatch.setitem(sys.modules, "fontTools.ttLib", None)
    refused(lambda: open_source(f"emoji:{font}"), install_command("emoji"), code="not-installed")


def test_emoji_files_without_emoji_are_refused(font):
    def refuse(split, *parts):
        refused(lambda: open_source(f"emoji:{font}{split}"), "apt install", *parts, code="missing", path=font)

    for content in (b"", b"1F600 ; fully-qualified", bytes(range(256))):
        font.with_name("emoji-test.txt").write_bytes(content)
        refuse("", "emoji-test.txt", "https://")
    font.with_name("emoji-test.txt").write_text(LIST)
    save_font(font, {16: {"grin": png((0, 0, 0))}})
    refuse("@test", "@test'")
    for bitmaps in ({}, {16: {"three": png((0, 0, 0))}}):  # outlines alone, and other characters
        save_font(font, bitmaps)
        refuse("")


def test_emoji_damaged_font_or_drawing_is_refused(font):
    whole = font.read_bytes()
    cuts = [whole[:length] for length in range(0, len(whole) - 4, 397)]
    for content in (*cuts, b"not a font at all", b"\x89PNG\r\n\x1a\n" + bytes(100), b"ttcf" + bytes(60)):
        font.write_bytes(content)
        refused(lambda: open_source(f"emoji:{font}"), "fonts-noto-color-emoji", path=font)
    save_font(font, {16: {"grin": png(COLOURS["grin"]), "man": png(COLOURS["man"])[:60]}})
    source = open_source(f"emoji:{font}")
    source.image(0)
    refused(lambda: source.image(1), "(man, U+1F468)", "data.on_corrupt=skip", code="unreadable", where=source.where(1))


@pytest.fixture(scope="module")
def noto():
    """The training and the test split."""
    if not (emoji.FONT.is_file() and emoji.GROUPS.is_file()):
        pytest.skip("Debian's fonts-noto-color-emoji and unicode-data are not installed")
    return open_source("emoji"), open_source("emoji@test")


def test_noto_has_every_group_and_kind_of_sequence(noto):
    train, held_out = noto
    assert train.classes == held_out.classes
    assert len(train.classes) == pra.recipe("emoji").model.num_classes == 9
    # Counts of Unicode 15.0's 3655 emoji; later versions have more.
    counts = np.bincount(train.labels, minlength=9) + np.bincount(held_out.labels, minlength=9)
    assert (counts >= [160, 2100, 150, 130, 215, 80, 260, 220, 255]).all()
    assert 0.07 < len(held_out) / (len(train) + len(held_out)) < 0.13
    assert np.bincount(held_out.labels, minlength=9).min() >= 1
    # Each kind of sequence.
    groups = {
        source.where(index).rsplit(" of emoji", 1)[0].split(" (", 1)[1]: source.classes[source.labels[index]]
        for source in noto
        for index in range(len(source))
    }
    for name, group in {
        "red heart, U+2764 U+FE0F": "Smileys & Emotion",
        "thumbs up: dark skin tone, U+1F44D U+1F3FF": "People & Body",
        "woman technologist, U+1F469 U+200D U+1F4BB": "People & Body",
        "polar bear, U+1F43B U+200D U+2744 U+FE0F": "Animals & Nature",
        "keycap: #, U+0023 U+FE0F U+20E3": "Symbols",
        "flag: Hungary, U+1F1ED U+1F1FA": "Flags",
        "flag: Wales, U+1F3F4 U+E0067 U+E0062 U+E0077 U+E006C U+E0073 U+E007F": "Flags",
    }.items():
        assert groups[f"{name})"] == group


def test_noto_splits_share_no_sequence_or_drawing(noto):
    plain, bare, drawings = re.compile(" (FE0F|1F3F[B-F])"), [], []
    for source in noto:
        listed = [source.where(index).split(", U+")[-1].split(") of")[0] for index in range(len(source))]
        bare.append({plain.sub("", codes.replace("U+", "")) for codes in listed})
        assert isinstance(source, emoji.EmojiSource)
        drawings += source.pngs
    assert not bare[0] & bare[1]
    assert len(set(drawings)) == len(drawings)


def test_noto_drawings_are_squares_on_white(noto):
    train = pickle.loads(pickle.dumps(noto[0]))  # as workers get it
    chosen = list(range(0, len(train), 97))
    for index in chosen:
        image = train.image(index)
        assert (image.size, image.mode) == ((136, 136), "RGBA")
        assert not np.asarray(image)[[0, 3, -4, -1], :, 3].any()  # 128 rows between transparent ones
    images, _ = load_images(train, chosen, (64, 64), 3, DataConfig(source="emoji"))
    assert (images[:, :, 0] == 255).all()
    assert images.float().std((1, 2, 3)).min() > 10
