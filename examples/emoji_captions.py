"""Builds a captioned folder of some 11,500 emoji at 64x64 from three sets with open licences.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 openmoji@17.0.0
    python examples/emoji_captions.py emoji-captions *.tgz
    pra data check folder:emoji-captions/train

Unpacked packages will do as well. OpenMoji comes as SVG: `pip install resvg-py` draws it. The folder holds

- `train/`,
- `heldout-emoji/`: emoji that are in no other folder, in every style,
- `heldout-pairs/`: emoji in one style, which `train/` has in the other styles,
- `LICENSES`.

Sub-folders are classes, Unicode's groups. `metadata.jsonl` has captions, style, code points and licence of a picture.
Each skin tone of an emoji is a separate picture, all in the same folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pra import PraError
from pra.utils.files import check_free, new_folder

SEED, HELD_EMOJI, HELD_PAIRS = 0, 0.05, 0.1
"""Share of the emoji held out in every style, and share of the others held out in one style."""
SIZE, KEYWORDS = 64, 3


class Set(NamedTuple):
    style: str
    version: str
    pictures: str  # files of the package
    licence: str
    source: str


SETS = {
    "emoji-datasource-google": Set(
        style="Google",
        version="16.0.0",
        pictures=r"img/google/64/.+\.png",
        licence="Apache-2.0",
        source="Noto Emoji, copyright Google LLC, https://github.com/googlefonts/noto-emoji",
    ),
    "emoji-datasource-twitter": Set(
        style="Twitter",
        version="16.0.0",
        pictures=r"img/twitter/64/.+\.png",
        licence="CC-BY-4.0",
        source="Twemoji, copyright Twitter, Inc and other contributors, https://github.com/jdecked/twemoji",
    ),
    "openmoji": Set(
        style="OpenMoji",
        version="17.0.0",
        pictures=r"color/svg/.+\.svg",
        licence="CC-BY-SA-4.0",
        source="OpenMoji, the open-source emoji and icon project, https://openmoji.org",
    ),
}
"""Sets that may be changed and shared, by the README files of the packages. Apple's and Facebook's sets may not."""
LICENSES = """The pictures keep the licences of their sets. `license` in metadata.jsonl names that of each picture.

{sets}
Names and keywords in the captions: openmoji.csv of OpenMoji, CC-BY-SA-4.0, mostly those of Unicode CLDR, Unicode-3.0.
The packages emoji-datasource-*: Cal Henderson, MIT.
OpenMoji's drawings were rendered at {size}x{size}. No other picture was changed.
"""


class Picture(NamedTuple):
    style: str
    code: str
    data: bytes


def main(out: Path, given: list[Path]) -> None:
    check_free(out, "choose another folder")
    packages = dict(map(read_package, given))
    if missing := [f"{name}@{one.version}" for name, one in SETS.items() if name not in packages]:
        fix = f"Fetch them by `npm pack {' '.join(missing)}`, and give the .tgz files of all sets"
        raise PraError(f"{len(missing)} sets are missing: {', '.join(missing)}. {fix}", "missing")
    table = csv.DictReader(io.StringIO(packages["openmoji"]["data/openmoji.csv"].decode()))
    emoji = {bare(row["hexcode"]): row for row in table if not row["group"].startswith("extras")}
    pictures = [picture for name in SETS for picture in drawn(SETS[name], packages[name]) if picture.code in emoji]
    with new_folder(out) as folder:
        counts = write(folder, pictures, emoji)
        versions = {name: json.loads(files["package.json"]).get("version") for name, files in packages.items()}
        sets = [f"{one.style}: {one.licence}. {one.source}; {name} {versions[name]}\n" for name, one in SETS.items()]
        (folder / "LICENSES").write_text(LICENSES.format(sets="".join(sets), size=SIZE))
    print(f"{out}: " + ", ".join(f"{count} pictures in {split}" for split, count in sorted(counts.items())))


def read_package(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a package's name, and of its files the pictures and tables."""
    known = re.compile("|".join([r"package\.json", r"data/openmoji\.csv", *(one.pictures for one in SETS.values())]))
    try:
        files = dict(_unpacked(path, known.fullmatch) if path.is_dir() else _members(path, known.fullmatch))
        name = json.loads(files["package.json"])["name"]
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise PraError(f"{path} is not an npm package ({error}). Give a .tgz or its folder", "unreadable") from None
    if name not in SETS:
        raise PraError(f"{path} holds {name}. Give {', '.join(SETS)}", "unknown")
    return name, files


def _unpacked(path: Path, wanted: Callable[[str], Any]) -> Iterator[tuple[str, bytes]]:
    for file in path.rglob("*"):
        if wanted(name := file.relative_to(path).as_posix()):
            yield name, file.read_bytes()


def _members(path: Path, wanted: Callable[[str], Any]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if wanted(name) and (file := tar.extractfile(member)):
                yield name, file.read()


def bare(code: str) -> str:
    """Return code points without the selector of the colourful form, which sets write at other places."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def drawn(one: Set, files: dict[str, bytes]) -> Iterator[Picture]:
    for name in sorted(filter(re.compile(one.pictures).fullmatch, files)):
        data = rendered(files[name]) if name.endswith(".svg") else files[name]
        yield Picture(one.style, bare(Path(name).stem), data)


def rendered(svg: bytes) -> bytes:
    try:
        import resvg_py
    except ImportError:
        raise PraError("OpenMoji comes as SVG. Install what draws it: pip install resvg-py", "not-installed") from None
    return bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), width=SIZE, height=SIZE, skip_system_fonts=True))


def write(folder: Path, pictures: list[Picture], emoji: dict[str, dict[str, str]]) -> dict[str, int]:
    family = families(pictures, emoji)
    styles = defaultdict[str, set[str]](set)
    for picture in pictures:
        styles[family[picture.code]].add(picture.style)
    rows = defaultdict[str, list[dict[str, Any]]](list)
    for picture in pictures:
        row = emoji[picture.code]
        name = f"{row['group']}/{picture.style.lower()}-{picture.code.lower()}.png"
        relatives = family[picture.code]
        split = split_of(relatives, picture.style, sorted(styles[relatives]))
        licence = next(one.licence for one in SETS.values() if one.style == picture.style)
        about = {"style": picture.style, "emoji": picture.code, "license": licence}
        rows[split].append({"file_name": name, "text": captions(picture, row, emoji[base(row)]), **about})
        (folder / split / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / split / name).write_bytes(picture.data)
    for split, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / split / "metadata.jsonl").write_text(text)
    return {split: len(lines) for split, lines in rows.items()}


def families(pictures: list[Picture], emoji: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the family of each emoji: skin tones look nearly alike, and some flags are those of other countries."""
    family = {picture.code: base(emoji[picture.code]) for picture in pictures}
    first: dict[bytes, str] = {}
    for picture in pictures:
        own, other = family[picture.code], family[first.setdefault(picture.data, picture.code)]
        if own != other:
            family = {code: other if name == own else name for code, name in family.items()}
    return family


def base(row: dict[str, str]) -> str:
    """Return the emoji without its skin tones."""
    return bare(row["skintone_base_hexcode"] or row["hexcode"])


def split_of(family: str, style: str, styles: list[str]) -> str:
    """Return the folder of a family in a style; a hash decides, so that an emoji keeps its folder when sets grow."""
    if share(family) < HELD_EMOJI:
        return "heldout-emoji"
    held = styles[int(share(family, "style") * len(styles))]
    return "heldout-pairs" if len(styles) > 1 and share(family, "pair") < HELD_PAIRS and style == held else "train"


def share(*parts: str) -> float:
    """Return a number in [0, 1) that is a function of the parts and the seed."""
    digest = hashlib.sha256(" ".join([str(SEED), *parts]).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def captions(picture: Picture, row: dict[str, str], tagged: dict[str, str]) -> list[str]:
    """Return four captions: name and style, then the same with keywords, in varying order.

    ``tagged`` is the emoji without skin tones: others have no keywords.
    """
    draw = random.Random(f"{SEED} {picture.style} {picture.code}")
    name, style = row["annotation"], f"{picture.style} style"
    for written, said in (("flag: ", "flag of "), ("keycap: ", "keycap "), (": ", ", ")):
        name = name.replace(written, said)
    known = dict.fromkeys(word.strip() for word in f"{tagged['tags']}, {tagged['openmoji_tags']}".split(","))
    keywords = [word for word in known if word and word.lower() not in name.lower()]
    texts = [f"{name}, {style}", f"{style}, {name}"]
    for _ in range(2):
        parts = [name, *draw.sample(keywords, min(KEYWORDS, len(keywords)))]
        draw.shuffle(parts)
        parts.insert(draw.choice([0, len(parts)]), style)
        texts.append(", ".join(parts))
    return list(dict.fromkeys(texts))


def parse(words: list[str]) -> tuple[Path, list[Path]]:
    if not words:
        raise PraError(f"no folder is given. Give a new one, and the tarballs or folders of {', '.join(SETS)}")
    return Path(words[0]), list(map(Path, words[1:]))


if __name__ == "__main__":
    try:
        main(*parse(sys.argv[1:]))
    except PraError as error:
        print(f"emoji_captions: error: {error}", file=sys.stderr)
        sys.exit(2)
