"""Draw the rooms of the package and what they import, from the source.

python docs/layout.py    # writes docs/images/layout.png
"""

from __future__ import annotations

import ast
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "pra"

ROOMS = {
    "errors": "one exception",
    "config": "settings that check themselves",
    "utils": "devices, processes, files",
    "models": "the architecture, written once",
    "method": "flow, noise, rollout, losses",
    "data": "images in a resumable order",
    "sampling": "the algorithm on a page",
    "training": "one loop, callbacks",
    "evaluation": "features, metrics, reports",
    "bench": "speed and memory",
    "recipes": "a run as a function",
    "sharing": "Hub, cards, export",
    "demo": "the web page",
    "commands": "one file each",
    "cli": "lists the commands",
}
"""The rooms from the bottom to the top: a room imports only rooms before it."""


def imports() -> dict[str, set[str]]:
    """Return the other rooms that each room imports, also inside functions."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):  # the front door
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            parts = [module.split(".") for module in modules]
            found[room] |= {part[1] for part in parts if part[0] == "pra" and len(part) > 1} & ROOMS.keys() - {room}
    return found


def upwards(found: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the imports of a room from a room above it."""
    order = list(ROOMS)
    return [(a, b) for a in found for b in sorted(found[a]) if order.index(b) > order.index(a)]


def direct(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leave out the arrows that longer paths imply."""

    def reach(room: str) -> set[str]:
        return found[room].union(*(reach(below) for below in found[room]))

    return {room: below - set().union(*(reach(other) for other in below)) for room, below in found.items()}


def draw(path: Path) -> None:
    """Draw the rooms by level, with arrows from each room to what it imports."""
    found = imports()
    assert not upwards(found), upwards(found)
    level: dict[str, int] = {}
    for room in ROOMS:
        level[room] = 1 + max((level[below] for below in found[room]), default=-1)
    rows = [[room for room in ROOMS if level[room] == number] for number in range(max(level.values()) + 1)]
    place = {
        room: (index - (len(row) - 1) / 2, number) for number, row in enumerate(rows) for index, room in enumerate(row)
    }
    figure, axes = plt.subplots(figsize=(8, 0.85 * len(rows)))
    look = {"boxstyle": "round,pad=0.45", "facecolor": "#e8f0fa", "edgecolor": "#30507a"}
    boxes = {
        room: axes.text(x, y, f"{room}\n{ROOMS[room]}", ha="center", va="center", fontsize=8, bbox=look)
        for room, (x, y) in place.items()
    }
    figure.canvas.draw()  # the boxes have their sizes now
    for room, below in direct(found).items():
        for other in below:
            far = level[room] - level[other] > 1
            style = {
                "arrowstyle": "->",
                "color": "#777777",
                "connectionstyle": f"arc3,rad={(0.25 if place[other][0] < 0 else -0.9) if far else 0}",
                "patchA": boxes[room].get_bbox_patch(),
                "patchB": boxes[other].get_bbox_patch(),
            }
            axes.annotate("", place[other], place[room], arrowprops=style)
    axes.set_xlim(-1.8, 1.8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.axis("off")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    """Draw the picture of the documentation."""
    draw(ROOT / "docs" / "images" / "layout.png")


if __name__ == "__main__":
    main()
