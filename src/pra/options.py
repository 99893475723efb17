"""The types of command-line options, shared by the commands.

What is optional shows its type alone: without "None" among the values, and without "(default: None)".
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Folder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Integer = Annotated[int | None, arg(constructor=int, help_behavior_hint="")]
Number = Annotated[float | None, arg(constructor=float, help_behavior_hint="")]
Flag = Annotated[bool, arg(help_behavior_hint="")]
Settings = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE", help_behavior_hint="")]
