"""Writes the reference of recipe keys from the schema.

python scripts/recipe_docs.py > docs/recipes.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mtp_ce.training.config.choice import groups_of
from mtp_ce.training.config.recipe import shipped_recipes
from mtp_ce.training.config.schema import EvaluationRecipe, Recipe

_HEAD = """\
<!-- Written by scripts/recipe_docs.py; a test compares. -->
# Recipes

A recipe is a YAML file, or the name of a shipped one ({shipped}), and any number
of overrides `a.b=c`:

```bash
train-mtp tiny train.steps=50 optimizer.lr=1e-3 tracking.kind=none
train-mtp rho1 'scorer={{name: shuffled, of: {{name: rho1_excess}}}}'
train-mtp tiny --print-config            # every key with its value after overrides, as a recipe
train-mtp tiny --dry-run                 # FLOPs, memory per rank, steps, reachable addresses; writes nothing
```

The value of a text key is taken as it is written: `data.corpus=*.jsonl`, `data.subset=no`. `null` means none, and
quotes around all of it are stripped. The value of any other key is YAML, with decimal numbers, `true` and `false`;
`yes`, `0100`, `1_000`, `0x10` and `1:30` are refused there, in files too. An override of `model.kind` or `scorer.name`
drops the options of the recipe that the new choice does not have, but none that is given on the command line.

An unknown key, a value of another type or out of range, or a duplicate key ends the command in one line with exit
code 2, before anything is loaded. `group=null` switches off a group that may be null. A key without a default is
required.

`scorer.name` also takes a class of your own as `package.module:Class`, if the recipe is a file on this machine: one
that is read from `s3://` may not name code to run. The module must be importable, as with `PYTHONPATH=. train-mtp ...`.
"""

_EVALUATION = """\
## eval-mtp

`eval-mtp CHECKPOINT a.b=c` takes these groups, by default from the run's own recipe if there is one: {groups}.
`device` is a top-level key.
"""

_NULLABLE = ", may be null"

_RANGES = {Ge: "≥ {}", Gt: "> {}", Le: "≤ {}", Lt: "< {}"}


def page() -> str:
    """Return the page."""
    shipped = ", ".join(f"`{name}`" for name in shipped_recipes())
    sections = [_HEAD.format(shipped=shipped), *groups(Recipe)]
    fields = EvaluationRecipe.model_fields.items()
    evaluated = ", ".join(f"`{name}`" for name, field in fields if groups_of(field))
    return "\n".join([*sections, _EVALUATION.format(groups=evaluated)])


def groups(schema: type[BaseModel]) -> Iterator[str]:
    """Yield a table for each group, top-level keys first; a group that occurs again refers to its first table."""
    waiting: list[tuple[str, str, type[BaseModel]]] = [("", "Top level", schema)]
    seen: dict[type[BaseModel], str] = {}
    for prefix, title, group in waiting:
        lines = [f"## {title}", "", " ".join((group.__doc__ or "").split()), ""]
        if group in seen:
            yield "\n".join([*lines, f"It has the keys of {seen[group]}.", ""])
            continue
        seen[group] = title.removesuffix(_NULLABLE)
        lines += ["| key | type | default | range | description |", "| --- " * 5 + "|"]
        for key, field in group.model_fields.items():
            lines.append(f"| `{prefix}{key}` | {' | '.join(_columns(field))} |")
            members = groups_of(field)
            for member in members:
                selected = f" ({_selector(member)})" if len(members) > 1 else ""
                nullable = _NULLABLE if NoneType in _members(field.annotation) else ""
                table = (f"{prefix}{key}.", f"`{prefix}{key}`{selected}{nullable}", member)
                if table not in waiting:
                    waiting.append(table)
        yield "\n".join([*lines, ""])


def _columns(field: FieldInfo) -> tuple[str, str, str, str]:
    return _type(field.annotation), _default(field), _range(field), _cell(field.description or "")


def _type(annotation: Any) -> str:
    names = []
    for member in _members(annotation):
        if get_origin(member) is Literal:
            names += [f"`{value}`" for value in get_args(member)]
        elif member is NoneType:
            names.append("null")
        elif isinstance(member, type) and issubclass(member, BaseModel):
            names.append("group")
        elif get_origin(member) is not None:
            arguments = ", ".join(_type(argument) for argument in get_args(member))
            names.append(f"{get_origin(member).__name__} of {arguments}")
        else:
            names.append({"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
                member.__name__, member.__name__
            ))  # fmt: skip
    return " or ".join(dict.fromkeys(names))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True) if field.default is PydanticUndefined else field.default
    if isinstance(value, BaseModel):
        return _selector(type(value)) if len(groups_of(field)) > 1 else "its defaults"
    return f"`{json.dumps(value, default=str)}`".replace('`"', "`").replace('"`', "`").replace("``", "empty")


def _range(field: FieldInfo) -> str:
    ranges = [_RANGES[type(rule)].format(_number(rule)) for rule in field.metadata if type(rule) in _RANGES]
    for rule in field.metadata:
        if isinstance(rule, MinLen):
            ranges.append("not empty" if rule.min_length == 1 else f"length ≥ {rule.min_length}")
        elif isinstance(rule, MaxLen):
            ranges.append(f"length ≤ {rule.max_length}")
        elif pattern := getattr(rule, "pattern", None):
            ranges.append(f"`{pattern}`")
    return _cell(", ".join(ranges))


def _number(rule: Any) -> str:
    (value,) = vars(rule).values() if hasattr(rule, "__dict__") else (getattr(rule, rule.__slots__[0]),)
    return "2^63" if value == 2**63 else str(value)


def _selector(group: type[BaseModel]) -> str:
    """The key and value that select a group: `kind: llama`."""
    for name in ("kind", "name"):
        field = group.model_fields.get(name)
        if field and get_origin(field.annotation) is Literal:
            return f"`{name}: {' or '.join(map(str, get_args(field.annotation)))}`"
    return f"`{group.__name__}`"


def _members(annotation: Any) -> list[Any]:
    """The members of a union without their Annotated wrappers; of another type, the type itself."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
