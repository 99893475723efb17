"""The Noto colour emoji: some 3600 drawings of 136x128 in one font file, their classes Unicode's groups."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from pra.data.images import Labelled, check_there, decode
from pra.errors import PraError, reason_of

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
GROUPS = Path("/usr/share/unicode/emoji/emoji-test.txt")
_FIX = (
    "apt install fonts-noto-color-emoji unicode-data, or give Noto's font as emoji:FONT.ttf, with "
    f"https://unicode.org/Public/emoji/latest/{GROUPS.name} beside it"
)
_SELECTOR = frozenset({0xFE0F})  # asks for the colourful form, the only one in the font
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
        """Whether the emoji belongs to the test split: about a tenth, the same in every version of Unicode.

        All skin tones of one sequence are nearly the same picture, so they are in one split.
        """
        bare = self.without(_SELECTOR | _SKIN_TONES)
        return zlib.crc32(" ".join(f"{code:X}" for code in bare).encode()) % 10 == 0


class EmojiSource(Labelled):
    """The emoji of one split in Unicode's order, each drawing once. ``pngs`` are their files (10 MB)."""

    def __init__(self, name: str, font: Path, test: bool) -> None:
        """Read the bitmaps and Unicode's ``emoji-test.txt``: beside the font, or where Debian has it."""
        check_there(font, "file", _FIX)
        beside = font.with_name(GROUPS.name)
        groups = beside if beside.is_file() else GROUPS
        check_there(groups, "file", _FIX)
        drawn = _drawn(_listed(groups), font)
        chosen = [(emoji, png) for emoji, png in drawn if emoji.held_out == test]
        if not chosen:
            raise PraError(f"{font} has no bitmaps of emoji in {groups} for this split. {_FIX}", "missing", path=font)
        classes = list(dict.fromkeys(emoji.group for emoji, _ in drawn))
        super().__init__(name, classes, np.array([classes.index(emoji.group) for emoji, _ in chosen], np.int64))
        self._emoji, self.pngs = zip(*chosen, strict=True)

    def image(self, index: int) -> Image.Image:
        """Return one drawing, mode "RGBA", in the middle of a transparent square."""
        drawing = decode(self.pngs[index], self.where(index)).convert("RGBA")
        return ImageOps.pad(drawing, (max(drawing.size),) * 2, color=(0, 0, 0, 0))

    def where(self, index: int) -> str:
        emoji = self._emoji[index]
        codes = " ".join(f"U+{code:04X}" for code in emoji.codes)
        return f"image {index} ({emoji.name}, {codes}) of {self.name}"


def _listed(path: Path) -> Iterator[_Emoji]:
    """Yield the fully qualified emoji of Unicode's list, without skin tones and hair alone ("Component")."""
    group = ""
    for line in path.read_text("utf-8", errors="replace").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif match := _LINE.fullmatch(line.rstrip()):
            yield _Emoji(tuple(int(code, 16) for code in match[1].split()), match[2], group)


def _drawn(listed: Iterator[_Emoji], font: Path) -> list[tuple[_Emoji, bytes]]:
    """Return the emoji that the font has, with their PNG files: the first of each file."""
    from fontTools.ttLib import TTFont

    try:
        with TTFont(font, lazy=True) as tables:
            pngs, glyphs = _pngs(tables), _glyphs(tables)
    except OSError:
        raise  # not the file's fault
    except Exception as error:  # on broken bytes fontTools raises any exception
        reason = reason_of(error)
        raise PraError(f"{font} is not a font, or damaged ({reason}). {_FIX}", "unreadable", path=font) from error
    found: dict[bytes, _Emoji] = {}
    for emoji in listed:
        png = pngs.get(glyphs.get(emoji.without(_SELECTOR), ""))
        if png:
            found.setdefault(png, emoji)
    return [(emoji, png) for png, emoji in found.items()]


def _glyphs(font: Any) -> dict[tuple[int, ...], str]:
    """Return the glyph of each code point, and of each sequence that the font's ligatures join."""
    characters: dict[int, str] = font.getBestCmap() or {}
    found: dict[tuple[int, ...], str] = {(code,): glyph for code, glyph in characters.items()}
    codes = {glyph: code for code, glyph in characters.items()}
    lookups = font["GSUB"].table.LookupList.Lookup if "GSUB" in font else []
    for subtable in (subtable for lookup in lookups for subtable in lookup.SubTable):
        actual = getattr(subtable, "ExtSubTable", subtable)  # for offsets of more than 16 bits
        for first, ligatures in getattr(actual, "ligatures", {}).items():
            for ligature in ligatures:
                parts = [first, *ligature.Component]
                if all(part in codes for part in parts):
                    found.setdefault(tuple(codes[part] for part in parts), ligature.LigGlyph)
    return found


def _pngs(font: Any) -> dict[str, bytes]:
    """Return the PNG file of each glyph, from the strike (the bitmaps of one size) with the largest."""
    if "CBDT" not in font or "CBLC" not in font:
        return {}
    strikes = zip(font["CBLC"].strikes, font["CBDT"].strikeData, strict=True)
    _, bitmaps = max(strikes, key=lambda strike: strike[0].bitmapSizeTable.ppemY)
    # Black and white formats have no such attribute.
    return {glyph: getattr(bitmap, "imageData", b"") for glyph, bitmap in bitmaps.items()}
