"""Files of the site beside the pages in docs/: the studies with their plots, and links to code as links to its page.

In the repository both lie beside docs/, and links from docs/ reach them as ``../studies`` and ``../src``.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import textwrap
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
STUDIES = "studies"
SHOWN = (".md", ".png", ".csv")


def on_files(files: Files, config: Any) -> Files:
    """Adds the studies' tables and plots, which belong to the page on evidence and not to the navigation."""
    for path in sorted((ROOT / STUDIES).rglob("*")):
        if path.suffix in SHOWN:
            uri = path.relative_to(ROOT).as_posix()
            file = File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links that leave docs/: to a study's file, to a module's reference; to anything else, its name alone. Code that a
    page quotes comes from the source."""
    up = "../" * len(PurePosixPath(page.file.src_uri).parts)

    def link(match: re.Match[str]) -> str:
        text, path = match[1], match[2]
        if path.startswith(f"{STUDIES}/") and path.endswith(SHOWN):
            return f"[{text}]({up.removeprefix('../')}{path})"
        code = path.startswith("src/") and PurePosixPath(path).suffix in ("", ".py")
        return f"[{text}][{module(path)}]" if code else text

    linked = re.sub(rf"\[([^\]]*)\]\({re.escape(up)}(\w[^)]*)\)", link, markdown)
    linked = re.sub(r"<!-- file: ([\w./]+) -->", lambda match: whole(match[1]), linked)
    return re.sub(r"<!-- source: ([\w.]+) -->", lambda match: quoted(match[1]), linked)


def quoted(name: str) -> str:
    """The source of a function or class, such as ``pra.method.rollout.parallel``, as a block of code."""
    found = inspect.getsource(pkgutil.resolve_name(name))
    return f"```python\n{textwrap.dedent(found)}```"


def whole(path: str) -> str:
    """A Python file of the repository as a block of code."""
    return f"```python\n{(ROOT / path).read_text()}```"


def module(path: str) -> str:
    """``src/pra/recipes/systems.py`` to ``pra.recipes.systems``, ``src/pra/sampling`` to ``pra.sampling``."""
    return path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").strip("/").replace("/", ".")
