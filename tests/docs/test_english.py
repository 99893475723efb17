"""The English of docstrings, texts and test names (CONTRIBUTING.md)."""

import ast
import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "studies", "benchmarks", "examples", "docs")
OPENINGS = re.compile(
    r"(What|Who|Whose|Which|Where|How|When|If|Because|While|Until|Since|That|Those|These|Such|It|Its|Their|There|Of|As|By"
    r"|With|Without|Within|For|On|In|At|To|From|After|Before|Between|Through|Over|Under|Above|Up|Left|Fed|So|Nor|Also"
    r"|Otherwise|Whatever|Whoever)\b"
)
"""Words that do not begin a docstring: a verb or a noun phrase does."""

NEGATED = re.compile(
    r"(?<!there )\b(?:is|are|was|were|been|knows?|names?|says?|sees?) no (?!longer|more|less)\w+"
    r"|\b(?:adds|gets|gives|has|helps|holds|keeps|leaves|makes|needs|reads|takes) none\b",
    re.I,
)
"""Negated nouns, as in "is no run" and "reads none": negate the verb, "is not a run", "does not read captions"."""

FRONTED = re.compile(r"(?:^\W*|[.;] )(?:Of(?! the allocated)|Whose|Who|Those)\b.*")
"""Sentences that front their object or lack a noun: begin with the subject. torch's own message is let pass."""

UNPLAIN = re.compile(r"\b(?:goes on|went on|by heart|to the bit|way out|anew|whoever)\b", re.I)
"""Expressions with a plainer word: resume or continue, overfit, bitwise, fix, again, anyone who."""

LONGEST_NAME = 60


def sources():
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != Path(__file__))


def pages():
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def found(pattern, paths):
    """Return the places of a pattern: file, line and match."""
    lines = ((path, number, line) for path in paths for number, line in enumerate(path.read_text().splitlines(), 1))
    return [f"{path.relative_to(ROOT)}:{n} {match[0]}" for path, n, line in lines for match in pattern.finditer(line)]


def docstrings(tree):
    """Yield line and text of the docstrings of a module, its classes, functions, constants and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            named = (ast.Assign, ast.AnnAssign)
            texts = [now for before, now in itertools.pairwise(node.body) if isinstance(before, named)]
            for text in (*node.body[:1], *texts):
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    yield text.lineno, str(text.value.value)


def test_docstrings_begin_with_a_verb_or_a_noun():
    texts = [(path, *text) for path in sources() for text in docstrings(ast.parse(path.read_text()))]
    assert len(texts) > 1000
    assert [
        f"{path.relative_to(ROOT)}:{line} {text}" for path, line, text in texts if OPENINGS.match(text.lstrip())
    ] == []


def test_texts_negate_the_verb_and_not_the_noun():
    assert found(NEGATED, [*sources(), *pages()]) == []


def test_sentences_begin_with_their_subject():
    assert found(FRONTED, [*sources(), *pages()]) == []


def test_texts_use_the_words_of_the_field():
    assert found(UNPLAIN, [*sources(), *pages()]) == []


def test_names_of_tests_are_short():
    names = [match for match in found(re.compile(r"def test_\w+"), sources()) if "tests/" in match]
    assert [name for name in names if len(name.rpartition(" ")[2]) > LONGEST_NAME] == []


def test_pages_are_short():
    limits = {ROOT / "README.md": 130, **dict.fromkeys((ROOT / "docs").rglob("*.md"), 200)}
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in limits}
    assert {path: length for path, length in lengths.items() if length > limits[ROOT / path]} == {}
