"""Docstrings are sentences: a function's begins with a verb, a value's is a noun phrase."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tinyexperts

PACKAGE = Path(tinyexperts.__file__).parent
PROPERTIES = {"property", "cached_property", "functools.cached_property"}

# First words of a fragment, which says neither what is done nor what a value is.
FRAGMENT_WORDS = """
of what where whether which that how who whose why when from with without as by so to in on at for if than beyond
beside and or but since because until while during between among
"""
# First words of a noun phrase, or of a sentence about something else than what the function does.
OTHER_WORDS = """
the a an this that these those it its he they their each every all any both some no none one two several only not more
most few many true false same other another here there
"""
FRAGMENT = set(FRAGMENT_WORDS.split())
NO_VERB = FRAGMENT | set(OTHER_WORDS.split())


def docstrings(source: str) -> Iterator[tuple[str, str, str]]:
    """Yield (name, kind, docstring) of the public definitions in a file; a kind is "function" or "value"."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if child.name.startswith("_") and child.name != "__init__":
                continue
            name, text = f"{prefix}{child.name}", ast.get_docstring(child)
            decorators = {ast.unparse(each) for each in child.decorator_list}
            is_value = isinstance(child, ast.ClassDef) or bool(decorators & PROPERTIES)
            if text:
                yield name, "value" if is_value else "function", text
            if isinstance(child, ast.ClassDef):
                yield from walk(child, f"{name}.")

    yield from walk(ast.parse(source), "")


def faults(source: str) -> list[str]:
    """Name the definitions whose docstring does not begin as it should."""
    found = []
    for name, kind, text in docstrings(source):
        words = text.split()
        first = words[0].strip("`\"'(,.:;").lower()
        if first in (NO_VERB if kind == "function" else FRAGMENT):
            found.append(f"{name}: {' '.join(words[:6])}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    assert faults(path.read_text()) == []


def test_fragments_are_seen():
    source = '''
class Good:
    """A value."""

    @property
    def size(self):
        """The number of rows."""

    def grow(self):
        """Add rows."""

class Bad:
    """What a model is made of."""

    @property
    def size(self):
        """Of one rank."""

    def grow(self):
        """The number of rows."""

def _private():
    """Whether nobody looks."""

def fits():
    """Whether it does."""
'''
    assert [each.split(":")[0] for each in faults(source)] == ["Bad", "Bad.size", "Bad.grow", "fits"]
