"""The English of docstrings (CONTRIBUTING.md)."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "studies", "benchmarks", "examples", "docs")
OPENINGS = {"What", "Who", "Whose", "Which", "Where", "Of", "As", "By", "That", "Those", "With"}
"""A docstring begins with a verb or a noun phrase, not with one of these."""


def test_docstrings_begin_with_a_verb_or_a_noun():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
        docs = [(node, ast.get_docstring(node)) for node in nodes]
        words = [(node, text.split()[0].strip(",.:")) for node, text in docs if text]
        found += [f"{path.relative_to(ROOT)}:{node.body[0].lineno} {word}" for node, word in words if word in OPENINGS]
    assert found == []
