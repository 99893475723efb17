"""The types of command-line options, shared by the commands, and the numbers in them.

What is optional shows its type alone: without "None" among the values, and without "(default: None)".
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
"""Numbers in one range of seeds or labels: beyond any sampling, and still no burden on memory."""


def parse_numbers(text: str, option: str) -> list[int]:
    """``"0,4-6"`` to ``[0, 4, 5, 6]``.

    Raises:
        PraError: anything else than numbers of at least 0 and ranges.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise PraError(f"{option} {text!r}: {part!r} is no number or range; write 0,3 or 0-15")
        if last >= 2**63:
            raise PraError(f"{option} {text!r}: {last} is too large; the largest is {2**63 - 1}")
        if last - first >= LONGEST_RANGE:
            raise PraError(f"{option} {text!r}: {part!r} is longer than {LONGEST_RANGE} numbers; take it in parts")
        numbers.extend(range(first, last + 1))
    return numbers
