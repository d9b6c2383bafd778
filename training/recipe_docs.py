"""Every key of a recipe as a page, from the schema itself.

python -m mtp_ce.training.recipe_docs > docs/recipes.md
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

from mtp_ce.training.config.recipe import shipped_recipes
from mtp_ce.training.config.schema import EvaluationRecipe, Recipe

_HEAD = """\
<!-- Made by python -m mtp_ce.training.recipe_docs; a test compares. -->
# Recipes

A recipe is a YAML file, or the name of a shipped one ({shipped}), and any number
of overrides `a.b=c`, whose values are read as YAML:

```bash
train-mtp tiny train.steps=50 optimizer.lr=1e-3 tracking.kind=none
train-mtp rho1 'scorer={{name: shuffled, of: {{name: rho1_excess}}}}'
train-mtp tiny --print-config            # every key with its value after overrides, as a recipe
train-mtp tiny --dry-run                 # FLOPs, memory of a rank, steps, what can be reached; writes nothing
```

A key that does not exist, a value of another type or out of range, or a key that is given twice ends the command in one
line with exit code 2, before anything is loaded. A group that may be null is switched off by `group=null`. Where a key
has no default, the recipe must give it.
"""

_EVALUATION = """\
## eval-mtp

`eval-mtp CHECKPOINT a.b=c` takes these groups, from the run's own recipe where there is one: {groups}.
`device` stands at the top.
"""

_NULLABLE = ", may be null"

_RANGES = {Ge: "≥ {}", Gt: "> {}", Le: "≤ {}", Lt: "< {}"}


def page() -> str:
    """The whole page."""
    shipped = ", ".join(f"`{name}`" for name in shipped_recipes())
    parts = [_HEAD.format(shipped=shipped), *groups(Recipe)]
    fields = EvaluationRecipe.model_fields.items()
    measured = ", ".join(f"`{name}`" for name, field in fields if _models(field.annotation))
    return "\n".join([*parts, _EVALUATION.format(groups=measured)])


def groups(schema: type[BaseModel]) -> Iterator[str]:
    """A table for each group, those at the top first; the keys of one that comes again are not repeated."""
    waiting: list[tuple[str, str, type[BaseModel]]] = [("", "At the top", schema)]
    seen: dict[type[BaseModel], str] = {}
    for prefix, title, group in waiting:
        lines = [f"## {title}", "", " ".join((group.__doc__ or "").split()), ""]
        if group in seen:
            yield "\n".join([*lines, f"Its keys are those of {seen[group]}.", ""])
            continue
        seen[group] = title.removesuffix(_NULLABLE)
        lines += ["| key | type | default | range | what it is |", "| --- " * 5 + "|"]
        for key, field in group.model_fields.items():
            lines.append(f"| `{prefix}{key}` | {' | '.join(_columns(field))} |")
            inside = _models(field.annotation)
            for part in inside:
                chosen = f" ({_choice(part)})" if len(inside) > 1 else ""
                nullable = _NULLABLE if NoneType in _parts(field.annotation) else ""
                found = (f"{prefix}{key}.", f"`{prefix}{key}`{chosen}{nullable}", part)
                if found not in waiting:
                    waiting.append(found)
        yield "\n".join([*lines, ""])


def _columns(field: FieldInfo) -> tuple[str, str, str, str]:
    return _type(field.annotation), _default(field), _range(field), _cell(field.description or "")


def _type(annotation: Any) -> str:
    names = []
    for part in _parts(annotation):
        if get_origin(part) is Literal:
            names += [f"`{value}`" for value in get_args(part)]
        elif part is NoneType:
            names.append("null")
        elif isinstance(part, type) and issubclass(part, BaseModel):
            names.append("group")
        elif get_origin(part) is not None:
            inner = ", ".join(_type(argument) for argument in get_args(part))
            names.append(f"{get_origin(part).__name__} of {inner}")
        else:
            names.append({"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
                part.__name__, part.__name__
            ))  # fmt: skip
    return " or ".join(dict.fromkeys(names))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True) if field.default is PydanticUndefined else field.default
    if isinstance(value, BaseModel):
        chosen = _choice(type(value))
        return chosen if len(_models(field.annotation)) > 1 else "its defaults"
    return f"`{json.dumps(value, default=str)}`".replace('`"', "`").replace('"`', "`").replace("``", "empty")


def _range(field: FieldInfo) -> str:
    said = [_RANGES[type(rule)].format(_number(rule)) for rule in field.metadata if type(rule) in _RANGES]
    for rule in field.metadata:
        if isinstance(rule, MinLen):
            said.append("not empty" if rule.min_length == 1 else f"length ≥ {rule.min_length}")
        elif isinstance(rule, MaxLen):
            said.append(f"length ≤ {rule.max_length}")
        elif pattern := getattr(rule, "pattern", None):
            said.append(f"`{pattern}`")
    return _cell(", ".join(said))


def _number(rule: Any) -> str:
    (value,) = vars(rule).values() if hasattr(rule, "__dict__") else (getattr(rule, rule.__slots__[0]),)
    return "2^63" if value == 2**63 else str(value)


def _choice(group: type[BaseModel]) -> str:
    """What the key that chooses among groups is for this one: `kind: llama`."""
    for name in ("kind", "name"):
        field = group.model_fields.get(name)
        if field and get_origin(field.annotation) is Literal:
            return f"`{name}: {' or '.join(map(str, get_args(field.annotation)))}`"
    return f"`{group.__name__}`"


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, or what is none, without what Annotated says of it."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [part for member in get_args(annotation) for part in _parts(member)]
    return [annotation]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
