"""The types of command-line options, and lists of numbers.

The help of an optional value shows its type alone, without "None" and "(default: None)".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from pra.errors import PraError

Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Folder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Output = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
Integer = Annotated[int | None, arg(constructor=int, help_behavior_hint="")]
Number = Annotated[float | None, arg(constructor=float, help_behavior_hint="")]
Flag = Annotated[bool, arg(help_behavior_hint="")]
Average = Annotated[str, arg(metavar="NAME")]
Settings = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE", help_behavior_hint="")]

LONGEST_RANGE = 10_000_000
"""Numbers in one range of seeds or labels."""


def parse_numbers(text: str, option: str) -> list[int]:
    """``"0,4-6"`` to ``[0, 4, 5, 6]``.

    Raises:
        PraError: anything else than numbers of at least 0 and ranges.
    """

    def wrong(problem: str) -> PraError:
        return PraError(f"{option} {text!r}: {problem}", option=option, value=repr(text))

    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise wrong(f"{part!r} is not a number or a range. Write 0,3 or 0-15")
        if last >= 2**63:
            raise wrong(f"{last} is too large. The largest is {2**63 - 1}")
        if last - first >= LONGEST_RANGE:
            raise wrong(f"{part!r} is longer than {LONGEST_RANGE} numbers. Take it in parts")
        numbers.extend(range(first, last + 1))
    return numbers
