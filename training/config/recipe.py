"""From a YAML file and `a.b=c` overrides to a checked recipe, and back.

    recipe = load_recipe("tiny", ["train.steps=100", "optimizer.lr=3e-4"])

Everything here is answered without torch, so that a mistake costs a second and not a minute. A key that
does not exist, a value of the wrong type or out of range, a key given twice: each is one `RecipeError`
whose message is one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mtp_ce.training.config.schema import EvaluationRecipe, Recipe
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.s3 import is_s3

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe | EvaluationRecipe)

_NOT_RESULTS = {"device", "micro_batch_size", "log_every", "activation_checkpointing", "cpu_offload"}

RECIPES_FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Give the recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(RECIPES_FOLDER.glob("*.yaml"))}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, check the result.

    Args:
        name_or_path: a shipped recipe's name, the path of a YAML file, or its s3:// address.
        overrides: `a.b=c`; c is read as YAML, and a later one wins over an earlier one.

    Raises:
        RecipeError: the file is missing or not YAML, or a key or value is wrong.
    """
    return _checked(Recipe, _parse(_find(name_or_path), name_or_path), overrides)


def load_evaluation(run: Path | None, overrides: Sequence[str] = ()) -> EvaluationRecipe:
    """Say what a checkpoint is to be measured on.

    Args:
        run: the recipe of the run that made it, which knows the text it was not trained on; None means defaults.
        overrides: as in `load_recipe`.

    Raises:
        RecipeError: as `load_recipe`.
    """
    tree: dict[str, Any] = {}
    if run:
        made = load_recipe(str(run))
        tree = made.model_dump(include={"data", "validation", "tracking"}) | {"device": made.train.device}
        # The checkpoint has a tokenizer of its own, and its vocabulary is what it is.
        tree["data"] |= {"tokenizer": None, "vocab_size": None}
    return _checked(EvaluationRecipe, tree, overrides)


def _checked(schema: type[AnyRecipe], tree: dict[str, Any], overrides: Sequence[str]) -> AnyRecipe:
    for override in overrides:
        _apply(tree, override)
    try:
        return cast(AnyRecipe, schema.model_validate(tree))
    except ValidationError as error:
        # A misspelt group is also a missing one; the unknown key is what explains both.
        first, *others = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        more = f" (and {len(others)} more)" if others else ""
        raise RecipeError(_explain(schema, first) + more) from None


def to_yaml(recipe: BaseModel) -> str:
    """Write every key of a recipe, defaults included, as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True, width=100)


def without_password(recipe: AnyRecipe) -> AnyRecipe:
    """Give the recipe as it may be shown and stored: a password in the tracking URI becomes ***."""
    tracking = recipe.tracking
    options = {
        key: hide_password(value) if isinstance(value, str) else value for key, value in tracking.options.items()
    }
    hidden = tracking.model_copy(update={"uri": hide_password(tracking.uri), "options": options})
    return cast(AnyRecipe, recipe.model_copy(update={"tracking": hidden}))


def hide_password(text: str) -> str:
    """Return a text in which the password of every URI is replaced by ***."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", text)


def flatten(recipe: BaseModel) -> dict[str, Any]:
    """Give the values of a recipe by dotted key."""
    return dict(leaves(recipe.model_dump()))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give the values of nested groups by dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def results_only(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of nested settings what changes only where, how fast and in how much memory something is computed.

    Rows per forward are such a thing unless the scorer weighs them together.
    """
    kept = {
        name: results_only(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in _NOT_RESULTS
    }
    if weighs_rows_together(settings.get("scorer")):
        kept["train"]["micro_batch_size"] = settings["train"]["micro_batch_size"]
    return kept


def weighs_rows_together(scorer: Mapping[str, Any] | None) -> bool:
    """Whether the weights of a row depend on what other rows a forward has, on this rank or on all."""
    if scorer is None:
        return False
    return scorer["name"] == "random_matched" or scorer.get("of", scorer).get("scope", "sequence") != "sequence"


def _find(name_or_path: str) -> Path:
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    if is_s3(name_or_path):
        from mtp_ce.training.storage.folders import fetch_file

        return fetch_file("recipe", name_or_path)
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"recipe {name_or_path} is a folder; expected a YAML file")
    near = difflib.get_close_matches(name_or_path, shipped, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise RecipeError(f"recipe '{name_or_path}' is neither a file nor a shipped recipe ({', '.join(shipped)}){hint}")


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: a key given twice is an error, and 3e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else key_node
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' is given twice in the same group", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, wants 3.0e-4; everyone writes 3e-4.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where}{line}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: {' '.join(str(error).split())}") from None


def _parse(path: Path, shown: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {shown} can't be read: {error}") from None
    tree = _read_yaml(text, f"recipe {shown}")
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {shown} holds {_kind(tree)}; expected groups of keys, see --print-config")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *groups, leaf = dotted.split(".")
    if not equals or not all([*groups, leaf]):
        raise RecipeError(f"override '{override}' is not of the form a.b=c")
    value = _read_yaml(text, f"override '{override}'")
    for depth, key in enumerate(groups):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise RecipeError(
                f"override '{override}' goes into '{'.'.join(groups[: depth + 1])}', a value and not a group"
            )
    tree[leaf] = value


def _groups(annotation: Any) -> list[type[BaseModel]]:
    """The groups that a field can hold: none for a plain value, several for a choice."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [group for part in get_args(annotation) for group in _groups(part)]


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, field in model.model_fields.items():
        yield prefix + key
        for group in _groups(field.annotation):
            yield from _known_keys(group, f"{prefix}{key}.")


def _description(schema: type[BaseModel], dotted: str) -> str:
    groups = [schema]
    field = None
    for key in dotted.split("."):
        field = next((group.model_fields[key] for group in groups if key in group.model_fields), None)
        if field is None:
            return ""
        groups = _groups(field.annotation)
    return field.description or "" if field else ""


def _dotted(schema: type[BaseModel], place: Sequence[str | int]) -> tuple[str, str | None]:
    """The dotted key that an error speaks of, and the name of the choice it was read as.

    pydantic puts that name between the keys: scorer, rho1_excess, eps.
    """
    groups = [schema]
    keys: list[str] = []
    chosen = None
    for part in map(str, place):
        field = next((group.model_fields[part] for group in groups if part in group.model_fields), None)
        if field is None and len(groups) > 1:
            named = [g for g in groups if part in _tags(g)]
            if named:
                groups, chosen = named, part
                continue
        keys.append(part)
        groups = _groups(field.annotation) if field else []
    return ".".join(keys), chosen


def _tags(group: type[BaseModel]) -> tuple[Any, ...]:
    """What the key that chooses among groups, a `name` or a `kind`, may be for this one."""
    field = group.model_fields.get("kind") or group.model_fields.get("name")
    return get_args(field.annotation) if field else ()


def _nearest_key(schema: type[BaseModel], dotted: str) -> str | None:
    known = list(dict.fromkeys(_known_keys(schema)))
    leaf = dotted.rpartition(".")[2]
    # A right name in the wrong place comes first, the least nested one: `lr` means optimizer.lr.
    if elsewhere := [key for key in known if key.rpartition(".")[2] == leaf]:
        return min(elsewhere, key=lambda key: key.count("."))
    if near := difflib.get_close_matches(dotted, known, n=1):
        return near[0]
    leaves = {key.rpartition(".")[2]: key for key in known}
    spelt = difflib.get_close_matches(leaf, leaves, n=1)
    return leaves[spelt[0]] if spelt else None


def _explain(schema: type[BaseModel], error: ErrorDetails) -> str:
    """Turn one pydantic error into one line: the key, what came, what was expected, the way out."""
    dotted, chosen = _dotted(schema, error["loc"])
    if error["type"] == "extra_forbidden":
        meant = _nearest_key(schema, dotted)
        if chosen and dotted in _known_keys(schema):
            return f"key '{dotted}' is not one of {dotted.rpartition('.')[0]} '{chosen}'; --print-config shows its keys"
        hint = f"did you mean '{meant}'?" if meant else "--print-config shows every key"
        return f"unknown key '{dotted}'; {hint}"
    if error["type"] == "union_tag_invalid":
        tag, expected = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        near = difflib.get_close_matches(tag, re.findall(r"'([^']*)'", expected), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"'{dotted}.{_chooser(error)}' is '{tag}'; it should be one of {expected}{hint}"
    if error["type"] == "union_tag_not_found":
        dotted = f"{dotted}.{_chooser(error)}"
    if error["type"] in ("missing", "union_tag_not_found"):
        return f"missing key '{dotted}': {_description(schema, dotted)}"
    if error["type"] == "value_error":
        return f"{dotted}: {error['ctx']['error']}" if dotted else str(error["ctx"]["error"])
    message = error["msg"].removeprefix("Input ").removeprefix("String ")
    if error["type"] in ("model_type", "model_attributes_type"):
        message = "should be a group of keys"
    meaning = _description(schema, dotted)
    came = error["input"]
    shown = _kind(came) if isinstance(came, dict | list) else _as_yaml(came)
    hint = ""
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(str(came), choices, n=1)
        hint = f"; did you mean '{near[0]}'?" if near and len(choices) > 1 else ""
    return f"'{dotted}' is {shown}; it {message}{hint}{f' ({meaning})' if meaning else ''}"


def _chooser(error: ErrorDetails) -> str:
    """The key that chooses among groups: `name` or `kind`."""
    return str(error["ctx"]["discriminator"]).strip("'")


def _as_yaml(value: Any) -> str:
    """Show a value as it is written in a recipe: null and true, not None and True."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "a group of keys"
    return "a list" if isinstance(value, list) else "nothing" if value is None else repr(value)
