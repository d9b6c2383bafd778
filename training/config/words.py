"""The YAML of recipes, read as it is written: an unquoted word stays a word until the schema knows its key.

YAML 1.1 reads no as false, 0100 as 64, 1_000 as 1000 and 1:30 as 90. Here numbers are decimal, truths are true and
false, and every other notation is a word: text for a key that is text, and an error for a key that is not.

A recipe may come from anywhere, so length, depth and number of values are bounded, an alias counted as what it stands
for.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from mtp_ce.training.errors import RecipeError

MAX_CHARACTERS = 100_000
_MAX_DEPTH = 20
_MAX_VALUES = 10_000
_MAX_KEY = 200

_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}
_NULL = ("", "~", "null", "Null", "NULL")
_TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LONGEST_NUMBER = 40

# Other notations of truths and numbers, of YAML 1.1 and of people.
_OTHER_TRUTHS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_GROUPED = re.compile(r"[-+]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?")
_PADDED = re.compile(r"([-+]?)0*([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)")
_BASED = re.compile(r"[-+]?0([xX][0-9a-fA-F]+|[oO][0-7]+|[bB][01]+)")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?")


class Word(str):
    """An unquoted word of a recipe, as it is written."""

    __slots__ = ()


class _Loader(yaml.BaseLoader):
    """Composes nodes, and refuses those that are too deep or stand for too much."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark, before = self.peek_event().start_mark, self._values
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"groups or lists are nested more than {_MAX_DEPTH} deep", problem_mark=mark
            )
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias stands inside of what it stands for", problem_mark=mark)
        self._values += self._sizes[id(node)] if alias else 1
        self._sizes[id(node)] = self._values - before
        if self._values > _MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"there are more than {_MAX_VALUES:,} values", problem_mark=mark)
        self._depth -= 1
        return node


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML into groups, lists, quoted texts (str) and unquoted words (`Word`); None where there is nothing.

    Args:
        text: the YAML.
        where: what it is, for messages.

    Raises:
        RecipeError: it is not YAML, too large, or has a duplicate key or a tag.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{where} has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}")
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else _built(node)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or error.context or ""
        if "alias" in f"{error.context} {problem}" or "cannot start any token" in problem:
            problem += "; put text with special characters in quotes"
        raise RecipeError(f"{where}{line}: {problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: {' '.join(str(error).split())}") from None


def _built(node: yaml.Node) -> Any:
    if node.tag not in _TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise yaml.MarkedYAMLError(problem=f"it has the tag {tag[:40]}; leave it out", problem_mark=node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        # A style is the kind of quotes.
        return Word(node.value) if node.style is None else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_built(item) for item in node.value]
    group: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is None or len(key) > _MAX_KEY:
            problem = "a key is a list or a group" if key is None else f"a key has {len(key):,} characters"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        if key in group:
            raise yaml.MarkedYAMLError(
                problem=f"key '{key}' is given twice in the same group", problem_mark=key_node.start_mark
            )
        group[key] = _built(value_node)
    if "<<" in group:
        bases = group.pop("<<")
        for base in bases if isinstance(bases, list) else [bases]:
            if not isinstance(base, dict):
                raise yaml.MarkedYAMLError(problem="'<<' merges a value that is no group", problem_mark=node.start_mark)
            merged = base | merged
    return merged | group


def value_of(word: str) -> Any:
    """Return the null, truth or number that an unquoted word stands for, or the word as text."""
    if word in _NULL:
        return None
    if word in _TRUTHS:
        return _TRUTHS[word]
    if len(word) <= _LONGEST_NUMBER:
        if _INTEGER.fullmatch(word):
            return int(word)
        if _NUMBER.fullmatch(word):
            return float(word)
        if _NOT_FINITE.fullmatch(word):
            return float(word.replace(".", ""))
    return str(word)


def spelling(word: str) -> str | None:
    """Return how to write the truth or number that a word may mean in another notation; None if it is ordinary text."""
    if len(word) > _LONGEST_NUMBER:
        return "a shorter number" if _INTEGER.fullmatch(word) else None
    if truth := _OTHER_TRUTHS.get(word.lower()):
        return truth
    if _SEXAGESIMAL.fullmatch(word):
        return "one number in decimal digits"
    digits = word.replace("_", "")
    if _GROUPED.fullmatch(digits):
        digits = digits.replace(",", "")
    if _BASED.fullmatch(digits):
        return str(int(digits, 0))
    if padded := _PADDED.fullmatch(digits):
        written = padded[1] + padded[2]
        return written if written != word else None
    return None
