"""A group of options chosen by its key `name`: from a table, or a class of the user's own as `package.module:Class`.

Tables hold strings, and the class is imported when a recipe names it, so that a table costs no import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from mtp_ce.registry import is_class_path, load_class
from mtp_ce.training.config.group import Group
from mtp_ce.training.errors import RecipeError

# The keys by which a group chooses a part, and which may hold a class path.
_CHOOSING = frozenset({"name", "kind", "reader"})


@dataclass(frozen=True)
class Choice:
    """Annotation of a field whose group of options depends on the group's key `name`.

    Attributes:
        base: what every class of options derives from.
        table: name -> `package.module:Class` of those that come with the package.
    """

    base: type[Group]
    table: Mapping[str, str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Have the chosen class validate the group; its errors keep their keys."""
        return core_schema.no_info_before_validator_function(self.validate, handler(source))

    def validate(self, options: Any) -> Any:
        """Validate a group of options by the class that its `name` stands for."""
        if isinstance(options, self.base):
            return options
        if not isinstance(options, dict):
            raise PydanticKnownError("model_attributes_type")
        if "name" not in options:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'name'"})
        name = options["name"]
        if not isinstance(name, str) or not (name in self.table or is_class_path(name)):
            known = ", ".join(map(repr, self.table))
            raise PydanticKnownError(
                "union_tag_invalid", {"discriminator": "'name'", "tag": str(name), "expected_tags": known}
            )
        return self.load(name).model_validate(options)

    def load(self, name: str) -> type[Group]:
        """Import the class of options that a name stands for.

        Raises:
            ValueError: it can't be imported, or does not derive from the base.
        """
        options: Any = load_class(name, self.table, "name")
        if not (isinstance(options, type) and issubclass(options, self.base)):
            raise ValueError(
                f"name is {name!r}, which is not a class of options; expected a subclass of "
                f"{self.base.__module__}.{self.base.__name__}"
            )
        return options

    def find(self, options: Any) -> type[Group] | None:
        """Return the class that validates these options; None where their name is missing or wrong."""
        try:
            return self.load(options["name"])
        except (TypeError, KeyError, ValueError):
            return None


def choice_of(field: FieldInfo) -> Choice | None:
    """Return a field's choice, if its group is chosen by name."""
    return next((rule for rule in field.metadata if isinstance(rule, Choice)), None)


def groups_of(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the groups that a field can hold: none for a plain value, several for a choice."""
    if choice := choice_of(field):
        return [choice.load(name) for name in choice.table]
    return list(_groups_in(field.annotation))


def options_of(field: FieldInfo, value: Any) -> list[type[BaseModel]]:
    """Return the groups that may validate a value of a field: one where its name or kind chooses, else all."""
    if choice := choice_of(field):
        return [found] if (found := choice.find(value)) else groups_of(field)
    groups = groups_of(field)
    kind = value.get("kind") if isinstance(value, Mapping) else None
    return [group for group in groups if kind in tags_of(group)] or groups


def tags_of(group: type[BaseModel]) -> tuple[Any, ...]:
    """Return the values of the key `kind` that select this group in a union."""
    field = group.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def _groups_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _groups_in(argument)


def refuse_class_paths(tree: Mapping[str, Any], address: str, prefix: str = "") -> None:
    """Refuse classes of the user's own in a recipe that was not read from this machine: loading one runs its code.

    Every key that may hold a class path passes here: `scorer.name`, `tracking.kind`, `data.reader`, `model.mtp.kind`.

    Args:
        tree: the recipe as it was read, before overrides.
        address: where it was read, for the message.
        prefix: dotted key of the tree in the recipe.

    Raises:
        RecipeError: a key holds a class path.
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            refuse_class_paths(value, address, f"{prefix}{key}.")
        elif key in _CHOOSING and isinstance(value, str) and is_class_path(value):
            raise RecipeError(
                f"{prefix}{key} is '{value}' in the recipe {address}; only a recipe on this machine may name a class "
                "of your own: download it, read it, and pass the file"
            )
