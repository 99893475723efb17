"""Names of the systems in tables and plots, and the colour and marker of each, the same in all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from studies.measures import Row
from studies.settings import SETTINGS

NAMES = {
    "pra": "PRA",
    "reconstructed": "unperturbed states",
    "states": "states, clean inputs",
    "exact": "exact rollout",
    "input-noise-x": "noise on pixels, x",
    "input-noise": "noise on pixels, v",
    "x-prediction": "teacher forcing, x",
    "teacher-forced": "teacher forcing, v",
    "jit": "JiT",
    "pra, distilled": "PRA, distilled head",
    "pixels": "raw pixels",
    "random": "random weights",
}
"""Names in tables and plots, by the name that commands take. A head over pixels predicts x or v."""

COLOURS = {
    "pra": "#d55e00",
    "reconstructed": "#009e73",
    "states": "#e69f00",
    "exact": "#cc79a7",
    "input-noise-x": "#882255",
    "input-noise": "#aa4499",
    "x-prediction": "#56b4e9",
    "teacher-forced": "#0072b2",
    "jit": "#7f7f7f",
    "pixels": "#000000",
}
"""Colours that colour-blind readers tell apart, after Okabe and Ito, and Paul Tol."""

MARKERS = dict(zip(COLOURS, "os^Pv<DXp*", strict=True))
"""A second way to tell the systems apart."""


def name_of(system: str, value: object = "") -> str:
    """Return a system's name in tables and plots. For `random`, ``value`` names the system of the initial weights."""
    name = NAMES.get(system, system)
    return f"{name} ({NAMES.get(str(value), value)})" if value not in ("", None) else name


def colour_of(system: str, value: object = "") -> str:
    """Return the colour of the system, or of the system that ``value`` names; grey by default."""
    return str(look_of(system, value)["color"])


def look_of(system: str, value: object = "") -> dict[str, Any]:
    """Return the colour and marker of the system, or of the system that ``value`` names, as arguments of ``plot``."""
    known = system if system in COLOURS else str(value)
    return {"color": COLOURS.get(known, "#444444"), "marker": MARKERS.get(known, "o")}


def in_ranges(numbers: Iterable[int]) -> str:
    """Write numbers as ``--seeds`` takes them: ``{0, 1, 2, 5}`` as ``0-2,5``."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    # A range of two is shorter written out.
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 2 else ",".join(map(str, part)) for part in parts)


def described(rows: list[Row]) -> str:
    """Describe the data and the training of rows of one setting."""
    setting = SETTINGS.get(rows[0]["setting"])
    size = f" {setting.image_size}x{setting.image_size}" if setting else ""
    steps = " or ".join(str(steps) for steps in sorted({row["steps"] for row in rows}))
    return f"{rows[0]['dataset']}{size}, {rows[0]['tokens']} tokens, {steps} steps"
