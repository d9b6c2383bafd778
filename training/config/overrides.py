"""Overrides `a.b=c` on a recipe that was read, and the meaning of its words.

The schema tells what a word means at its key: text as it is written, or a null, truth or number. A group that is chosen
by `name` or `kind` follows an override of it: options of the recipe that only the old choice has are dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mtp_ce.training.config.choice import groups_of, options_of
from mtp_ce.training.config.words import Word, read_yaml, spelling, value_of
from mtp_ce.training.errors import RecipeError

_LONGEST_KEY = 200


def apply_override(schema: type[BaseModel], tree: dict[str, Any], override: str) -> str:
    """Set one key of a recipe, in place.

    Args:
        schema: the recipe's class.
        tree: the recipe as it was read.
        override: `a.b=c`. For a key that is text, c is the text: null means none, and quotes around all of it are
            stripped. For any other key, c is YAML.

    Returns:
        The dotted key.

    Raises:
        RecipeError: it is not of that form, c is not YAML, or a group of the key is a value.
    """
    dotted, equals, text = override.partition("=")
    *groups, leaf = keys = dotted.split(".")
    if not equals or not all(keys) or len(dotted) > _LONGEST_KEY:
        raise RecipeError(f"{_shown(override)} is not of the form a.b=c")
    fields = _fields_at(schema, tree, keys)
    value = _text(text) if fields and _types(fields) <= {str} else _value(override, text, known=bool(fields))
    for depth, key in enumerate(groups):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise RecipeError(
                f"{_shown(override)} sets a key of '{'.'.join(groups[: depth + 1])}', a value and not a group"
            )
    tree[leaf] = value
    return dotted


def _shown(override: str) -> str:
    return f"override '{' '.join(override.split())[:_LONGEST_KEY]}'"


def _text(text: str) -> str | None:
    """Return the text that an override gives to a key that is text."""
    stripped = text.strip()
    if stripped == "null":
        return None
    if len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\"":
        try:
            quoted = read_yaml(stripped, "")
        except RecipeError:
            return text
        return quoted if type(quoted) is str else text
    return text


def _value(override: str, text: str, known: bool) -> Any:
    try:
        value = read_yaml(text, _shown(override))
    except RecipeError:
        if known:
            raise
        return text
    if known and value is None:
        raise RecipeError(f"{_shown(override)} has no value; give one, or null")
    return value


def follow_choices(
    groups: Sequence[type[BaseModel]],
    before: Mapping[str, Any],
    tree: dict[str, Any],
    given: Collection[str],
    prefix: str = "",
) -> None:
    """Drop the options of choices that overrides have changed, in place: those of the recipe that the new one lacks.

    Args:
        groups: the classes that may validate the tree.
        before: the recipe without overrides.
        tree: the recipe with overrides.
        given: dotted keys of the overrides, which stay.
        prefix: dotted key of the tree.
    """
    for key, value in tree.items():
        was, fields = before.get(key), [group.model_fields[key] for group in groups if key in group.model_fields]
        if not (fields and isinstance(value, dict) and isinstance(was, Mapping)):
            continue
        now, then = (options_of(fields[0], group) for group in (value, was))
        if len(groups_of(fields[0])) > 1 and len(now) == len(then) == 1 and now != then:
            for option in then[0].model_fields.keys() - now[0].model_fields.keys():
                if not is_given(f"{prefix}{key}.{option}", given):
                    value.pop(option, None)
        follow_choices(now, was, value, given, f"{prefix}{key}.")


def is_given(dotted: str, given: Collection[str]) -> bool:
    """Return whether overrides set a key, a group that holds it, or a key inside of it."""
    return any(f"{dotted}.".startswith(f"{key}.") or key.startswith(f"{dotted}.") for key in given)


def with_meaning(tree: Mapping[str, Any], groups: Sequence[type[BaseModel]], prefix: str = "") -> dict[str, Any]:
    """Return a recipe whose words are texts, nulls, truths and numbers, as the schema has them at their keys.

    Args:
        tree: the recipe as it was read; its quoted texts and typed values stay as they are.
        groups: the classes that may validate it.
        prefix: dotted key of the tree.

    Raises:
        RecipeError: a word without a type in the schema, such as an option of an own tracker, could mean two things.
    """
    return {
        key: _meaning(value, [group.model_fields[key] for group in groups if key in group.model_fields], prefix + key)
        for key, value in tree.items()
    }


def _meaning(value: Any, fields: Sequence[FieldInfo] | None, key: str) -> Any:
    """Return a value with its words read; without fields the key is unknown, with None it has any type."""
    if isinstance(value, Mapping):
        groups = [group for field in fields or () for group in options_of(field, value)]
        if groups or fields == []:
            return with_meaning(value, groups, f"{key}.")
        return {name: _meaning(inner, None, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [_meaning(item, fields, key) for item in value]
    if not isinstance(value, Word):
        return value
    meant = value_of(value)
    if fields is None and isinstance(meant, str) and (written := spelling(value)):
        raise RecipeError(f"'{key}' is {value}; write {written}, or put it in quotes if it is text")
    types = _types(fields or ())
    if str in types and meant is not None and not (types - {str} and not isinstance(meant, str)):
        return str(value)
    return meant


def _fields_at(schema: type[BaseModel], tree: Any, keys: Sequence[str]) -> list[FieldInfo]:
    """Return the fields that a dotted key may be, in the classes that the recipe chooses."""
    groups: list[type[BaseModel]] = [schema]
    fields: list[FieldInfo] = []
    for key in keys:
        fields = [group.model_fields[key] for group in groups if key in group.model_fields]
        tree = tree.get(key) if isinstance(tree, Mapping) else None
        groups = [group for field in fields for group in options_of(field, tree)]
    return fields


def _types(fields: Sequence[FieldInfo]) -> set[Any]:
    """Return the types of fields, without null."""
    return {kind for field in fields for kind in _members(field.annotation)} - {type(None)}


def _members(annotation: Any) -> list[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _members(arguments[0])
    if origin in (Union, UnionType):
        return [member for argument in arguments for member in _members(argument)]
    return [type(value) for value in arguments] if origin is Literal else [annotation]
