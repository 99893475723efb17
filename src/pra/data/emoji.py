"""The Noto colour emoji: some 3600 drawings of 136x128 in one font file, their classes Unicode's groups."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pra.data.images import decode
from pra.errors import PraError, reason_of
from pra.utils.extras import install_command

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
GROUPS = Path("/usr/share/unicode/emoji/emoji-test.txt")
_GROUPS_URL = f"https://unicode.org/Public/emoji/latest/{GROUPS.name}"
_PACKAGES = "apt install fonts-noto-color-emoji unicode-data"
_SELECTOR = frozenset({0xFE0F})  # asks for the colourful form; the font has no other and ignores it
_SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
_LINE = re.compile(r"([0-9A-F]{1,5}(?: [0-9A-F]{1,5})*) *; fully-qualified *# \S+ E\d+\.\d+ (.+)")


class _Emoji(NamedTuple):
    codes: tuple[int, ...]
    name: str
    group: str

    def without(self, dropped: frozenset[int]) -> tuple[int, ...]:
        return tuple(code for code in self.codes if code not in dropped)

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the test split: about a tenth, the same in every version of Unicode.

        One sequence in all its skin tones is on one side: they are nearly the same picture.
        """
        bare = self.without(_SELECTOR | _SKIN_TONES)
        return zlib.crc32(" ".join(f"{code:X}" for code in bare).encode()) % 10 == 0


class EmojiSource:
    """The emoji of one split in Unicode's order, each drawing once. Their PNG files are held in memory (10 MB)."""

    def __init__(self, name: str, font: Path, test: bool) -> None:
        """Read the bitmaps and Unicode's ``emoji-test.txt``: beside the font, or where Debian has it.

        Raises:
            PraError: fontTools is not installed, a file is missing or damaged, or the font has no bitmaps.
        """
        if not font.is_file():
            problem = "is not a file" if font.exists() else "does not exist"
            raise PraError(f"data source {name!r}: {font} {problem}; {_PACKAGES}, or give a font as emoji:FONT.ttf")
        groups = _groups_file(name, font)
        listed = list(_listed(groups))
        if not listed:
            raise PraError(f"{groups} lists no emoji; replace it by {_GROUPS_URL}")
        drawn = _drawn(listed, name, font)
        if not drawn:
            raise PraError(f"{font} has a bitmap of none of the emoji in {groups}; use Noto's: {_PACKAGES}")
        self.name = name
        self.classes = tuple(dict.fromkeys(emoji.group for emoji, _ in drawn))
        chosen = [(emoji, png) for emoji, png in drawn if emoji.held_out == test]
        if not chosen:
            raise PraError(f"data source {name!r}: {font} has too few emoji for this split; use Noto's: {_PACKAGES}")
        self.labels = np.array([self.classes.index(emoji.group) for emoji, _ in chosen], np.int64)
        self._emoji = [emoji for emoji, _ in chosen]
        self._pngs = [png for _, png in chosen]

    def __len__(self) -> int:
        return len(self._pngs)

    def image(self, index: int) -> Image.Image:
        """One drawing, mode "RGBA", in the middle of a transparent square.

        Raises:
            CorruptImage: it cannot be decoded.
        """
        drawing = decode(self._pngs[index], self.where(index)).convert("RGBA")
        side = max(drawing.size)
        square = Image.new("RGBA", (side, side))
        square.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
        return square

    def where(self, index: int) -> str:
        """``"image 17 (kissing face, U+1F617) of emoji"``."""
        emoji = self._emoji[index]
        codes = " ".join(f"U+{code:04X}" for code in emoji.codes)
        return f"image {index} ({emoji.name}, {codes}) of {self.name}"


# --- Unicode's list -----------------------------------------------------------------------------------------


def _groups_file(name: str, font: Path) -> Path:
    for path in (font.with_name(GROUPS.name), GROUPS):
        if path.is_file():
            return path
    raise PraError(
        f"data source {name!r}: {GROUPS}, which names the classes, does not exist; apt install unicode-data, "
        f"or put {_GROUPS_URL} beside {font}"
    )


def _listed(path: Path) -> Iterator[_Emoji]:
    """The fully qualified emoji; skin tones and hair alone ("Component") are not among them."""
    group = ""
    for line in path.read_text("utf-8", errors="replace").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif match := _LINE.fullmatch(line.rstrip()):
            yield _Emoji(tuple(int(code, 16) for code in match[1].split()), match[2], group)


# --- the font -----------------------------------------------------------------------------------------------


def _drawn(listed: list[_Emoji], name: str, font: Path) -> list[tuple[_Emoji, bytes]]:
    """The emoji that the font has, with their PNG files. Of those with the same file, the first."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError:
        raise PraError(f"data source {name!r} needs fontTools; {install_command('emoji')}") from None
    try:
        with TTFont(font, lazy=True) as tables:
            pngs = _pngs(tables) if "CBDT" in tables and "CBLC" in tables else None
            glyphs = _glyphs(tables)
    except OSError:
        raise  # not the file's fault
    except Exception as error:  # on broken bytes fontTools raises whatever it stumbles over
        raise PraError(
            f"{font} is not a font, or damaged ({reason_of(error)}); {_PACKAGES} brings a good one"
        ) from error
    if pngs is None:
        raise PraError(
            f"{font} holds no bitmaps (tables CBDT and CBLC), and outlines are not read; use Noto's: {_PACKAGES}"
        )
    found: dict[bytes, _Emoji] = {}
    for emoji in listed:
        png = pngs.get(glyphs.get(emoji.without(_SELECTOR), ""))
        if png:
            found.setdefault(png, emoji)
    return [(emoji, png) for png, emoji in found.items()]


def _glyphs(font: Any) -> dict[tuple[int, ...], str]:
    """The glyph of each code point, and of each sequence of them that the font's ligatures make one.

    A shaping engine would also try parts of a sequence. Emoji are drawn whole or not at all.
    """
    characters: dict[int, str] = font.getBestCmap() or {}
    found: dict[tuple[int, ...], str] = {(code,): glyph for code, glyph in characters.items()}
    codes = {glyph: code for code, glyph in characters.items()}
    for first, rest, glyph in _ligatures(font):
        if all(part in codes for part in (first, *rest)):
            found.setdefault((codes[first], *(codes[part] for part in rest)), glyph)
    return found


def _ligatures(font: Any) -> Iterator[tuple[str, list[str], str]]:
    """(first glyph, the others, the glyph in their place) of each ligature, in the order of precedence."""
    lookups = font["GSUB"].table.LookupList.Lookup if "GSUB" in font else []
    for subtable in (subtable for lookup in lookups for subtable in lookup.SubTable):
        actual = getattr(subtable, "ExtSubTable", subtable)  # where offsets of 16 bits do not reach
        for first, ligatures in getattr(actual, "ligatures", {}).items():
            yield from ((first, ligature.Component, ligature.LigGlyph) for ligature in ligatures)


def _pngs(font: Any) -> dict[str, bytes]:
    """The PNG file of each glyph, from the strike (the set of bitmaps of one size) with the largest."""
    strikes = zip(font["CBLC"].strikes, font["CBDT"].strikeData, strict=True)
    _, bitmaps = max(strikes, key=lambda strike: strike[0].bitmapSizeTable.ppemY)
    # Formats without PNG, for black and white, have no such attribute.
    return {glyph: getattr(bitmap, "imageData", b"") for glyph, bitmap in bitmaps.items()}
