"""From pydantic's errors to one line: the key, what came, what was expected, the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from mtp_ce.training.config.choice import choice_of, groups_of, tags_of
from mtp_ce.training.config.words import spelling

# Errors about a text where a number or a truth is expected.
_NO_TEXT = {"int_type", "float_type", "bool_type"}
_LONGEST_VALUE = 80


class _Location(NamedTuple):
    """Where an error is.

    Attributes:
        dotted: the dotted key.
        parents: the groups that may hold the key.
        chosen: the name or kind that selected the group, as "scorer 'rho1_excess'"; None where there is no choice.
    """

    dotted: str
    parents: list[type[BaseModel]]
    chosen: str | None


def explain(schema: type[BaseModel], tree: Mapping[str, Any], error: ErrorDetails) -> str:
    """Format one pydantic error as a line.

    Args:
        schema: the recipe's class.
        tree: what was validated.
        error: one of the errors.
    """
    dotted, parents, chosen = _locate(schema, tree, error["loc"])
    if error["type"] == "extra_forbidden":
        return _unknown_key(schema, dotted, parents, chosen)
    if error["type"] == "union_tag_invalid":
        tag, expected = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        near = difflib.get_close_matches(tag, re.findall(r"'([^']*)'", expected), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        own = ", or a class of your own as package.module:Class" if _chooser(error) == "name" else ""
        return f"'{dotted}.{_chooser(error)}' is '{tag[:_LONGEST_VALUE]}'; it should be one of {expected}{own}{hint}"
    if error["type"] == "union_tag_not_found":
        dotted = f"{dotted}.{_chooser(error)}"
    if error["type"] in ("missing", "union_tag_not_found"):
        return f"missing key '{dotted}': {_description(schema, tree, dotted)}"
    if error["type"] == "value_error":
        return f"{dotted}: {error['ctx']['error']}" if dotted else str(error["ctx"]["error"])
    message = error["msg"].removeprefix("Input ").removeprefix("String ")
    if error["type"] in ("model_type", "model_attributes_type"):
        message = "should be a group of keys"
    meaning = _description(schema, tree, dotted)
    value = error["input"]
    shown = kind_of(value) if isinstance(value, dict | list) else _as_yaml(value)
    hint = ""
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean '{near[0]}'?" if near and len(choices) > 1 else ""
    elif error["type"] in _NO_TEXT and isinstance(value, str) and (written := spelling(value)):
        truth = written in ("true", "false")
        hint = f"; write {written}" if truth == (error["type"] == "bool_type") else ""
    return f"'{dotted}' is {shown}; it {message}{hint}{f' ({meaning})' if meaning else ''}"


def kind_of(value: Any) -> str:
    """Name the kind of a YAML value."""
    if isinstance(value, dict):
        return "a group of keys"
    return "a list" if isinstance(value, list) else "nothing" if value is None else repr(value)


def _unknown_key(schema: type[BaseModel], dotted: str, parents: list[type[BaseModel]], chosen: str | None) -> str:
    known = list(dict.fromkeys(_known_keys(schema)))
    if chosen and dotted in known:
        return f"key '{dotted}' is not one of {chosen}; --print-config shows its keys"
    prefix = dotted.rpartition(".")[0]
    # A class of the user's own has keys that the schema does not know.
    known += [f"{prefix}.{key}" for group in parents for key in group.model_fields if chosen]
    near = _nearest_key(known, dotted)
    hint = f"did you mean '{near}'?" if near else "--print-config shows every key"
    return f"unknown key '{dotted}'; {hint}"


def _locate(schema: type[BaseModel], tree: Mapping[str, Any], loc: Sequence[str | int]) -> _Location:
    """Find the key of an error.

    In a union that pydantic discriminates, the tag stands between the keys: model, llama, mtp. For a group chosen by
    name, the tree tells which class validated it.
    """
    groups, parents = [schema], [schema]
    value: Any = tree
    keys: list[str] = []
    chosen = None
    for part in map(str, loc):
        field = next((group.model_fields[part] for group in groups if part in group.model_fields), None)
        if field is None and len(groups) > 1 and (tagged := [group for group in groups if part in tags_of(group)]):
            groups, chosen = tagged, f"{'.'.join(keys)} '{part}'"
            continue
        keys.append(part)
        value = value.get(part) if isinstance(value, Mapping) else None
        parents, groups = groups, groups_of(field) if field else []
        if field and (choice := choice_of(field)) and (options := choice.find(value)):
            groups, chosen = [options], f"{'.'.join(keys)} '{value['name']}'"
    return _Location(".".join(keys), parents, chosen)


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, field in model.model_fields.items():
        yield prefix + key
        for group in groups_of(field):
            yield from _known_keys(group, f"{prefix}{key}.")


def _description(schema: type[BaseModel], tree: Mapping[str, Any], dotted: str) -> str:
    *_, key = keys = dotted.split(".")
    fields = (group.model_fields.get(key) for group in _locate(schema, tree, keys).parents)
    return next((field.description or "" for field in fields if field), "")


def _nearest_key(known: Sequence[str], dotted: str) -> str | None:
    leaf = dotted.rpartition(".")[2]
    # A right name in the wrong group comes first, the least nested one: `lr` means optimizer.lr.
    if elsewhere := [key for key in known if key.rpartition(".")[2] == leaf]:
        return min(elsewhere, key=lambda key: key.count("."))
    if near := difflib.get_close_matches(dotted, known, n=1):
        return near[0]
    leaves = {key.rpartition(".")[2]: key for key in known}
    spelt = difflib.get_close_matches(leaf, leaves, n=1)
    return leaves[spelt[0]] if spelt else None


def _chooser(error: ErrorDetails) -> str:
    """The key that selects a group: `name` or `kind`."""
    return str(error["ctx"]["discriminator"]).strip("'")


def _as_yaml(value: Any) -> str:
    """Format a value as it is written in a recipe: null and true, not None and True."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[:_LONGEST_VALUE]}..."
