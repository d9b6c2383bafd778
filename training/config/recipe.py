"""From a YAML file and `a.b=c` overrides to a validated recipe, and back.

    recipe = load_recipe("tiny", ["train.steps=100", "optimizer.lr=3e-4"])

Nothing here imports torch, so that a mistake is reported within a second. An unknown key, a value of the wrong type or
out of range, a duplicate key: each raises one `RecipeError` whose message is one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from mtp_ce.training.addresses import is_shortened, shown, shown_values
from mtp_ce.training.config.choice import refuse_class_paths
from mtp_ce.training.config.explain import explain, kind_of
from mtp_ce.training.config.schema import EvaluationRecipe, Recipe
from mtp_ce.training.config.scorers.options import ScorerConfig
from mtp_ce.training.config.scorers.table import AnyScorer
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.s3 import SET_CREDENTIALS, is_s3

_SCORER: TypeAdapter[ScorerConfig] = TypeAdapter(AnyScorer)

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe | EvaluationRecipe)

# Keys of a loop that change where, how fast and in how much memory it computes, not its results.
_NOT_RESULTS = {"device", "micro_batch_size", "log_every", "activation_checkpointing", "cpu_offload"}

RECIPES_FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(RECIPES_FOLDER.glob("*.yaml"))}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, validate the result.

    Args:
        name_or_path: a shipped recipe's name, the path of a YAML file, or its s3:// address.
        overrides: `a.b=c`; c is parsed as YAML, and a later one wins over an earlier one.

    Raises:
        RecipeError: the file is missing or not YAML, a key or value is wrong, or a recipe in S3 names a class.
    """
    tree = _parse(_find(name_or_path), name_or_path)
    if is_s3(name_or_path):
        refuse_class_paths(tree, name_or_path)
    return _validate(Recipe, tree, overrides)


def load_evaluation(run: Path | None, overrides: Sequence[str] = ()) -> EvaluationRecipe:
    """Return what to evaluate a checkpoint on.

    Args:
        run: the recipe of the run that wrote it, which defines its held-out text; None means defaults.
        overrides: as in `load_recipe`.

    Raises:
        RecipeError: as `load_recipe`.
    """
    tree: dict[str, Any] = {}
    if run:
        # Without them, an address that is stored shortened would be asked for again and again.
        made = load_recipe(str(run), [override for override in overrides if re.match(r"tracking\b", override)])
        tree = made.model_dump(include={"data", "validation", "tracking"}) | {"device": made.train.device}
        # The tokenizer and its vocabulary are the checkpoint's.
        tree["data"] |= {"tokenizer": None, "vocab_size": None}
    return _validate(EvaluationRecipe, tree, overrides)


def _check_addresses(recipe: Recipe | EvaluationRecipe) -> None:
    """Refuse credentials in addresses, which are shown and stored; those of trackers are shortened instead.

    Raises:
        RecipeError: an address has more than scheme, host, port and path, or was stored without it.
    """
    for key, text in _texts(recipe.model_dump()):
        if key.startswith("tracking."):
            if recipe.tracking.kind != "none" and is_shortened(text):
                raise RecipeError(f"{key} is '{text}', stored without its credentials or query; give {key}=... again")
        elif key != "description" and "://" in text and shown(text) != text:
            raise RecipeError(
                f"{key} has credentials or a query in its address, which is shown and stored; leave them out, and "
                f"{SET_CREDENTIALS}"
            )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text of nested groups and lists by dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _texts(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part, key)


def _validate(schema: type[AnyRecipe], tree: dict[str, Any], overrides: Sequence[str]) -> AnyRecipe:
    for override in overrides:
        _apply(tree, override)
    try:
        recipe = cast(AnyRecipe, schema.model_validate(tree))
    except ValidationError as error:
        # A misspelt group is reported as unknown and as missing; the unknown key explains both.
        first, *others = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        more = f" (and {len(others)} more)" if others else ""
        raise RecipeError(explain(schema, tree, first) + more) from None
    _check_addresses(recipe)
    return recipe


def to_yaml(recipe: BaseModel) -> str:
    """Format every key of a recipe, defaults included, as YAML for `load_recipe`, with addresses shortened."""
    return yaml.safe_dump(shown_values(recipe.model_dump()), sort_keys=False, allow_unicode=True, width=100)


def flatten(recipe: BaseModel) -> dict[str, Any]:
    """Return the values of a recipe by dotted key, with addresses shortened."""
    return dict(leaves(shown_values(recipe.model_dump())))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested groups by dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def results_only(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings without those that change only where, how fast and in how much memory a run computes.

    Rows per forward are such a setting, unless the weights of a row depend on the other rows of its forward.
    """
    relevant = {
        name: results_only(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in _NOT_RESULTS
    }
    if "scorer" in settings and _SCORER.validate_python(settings["scorer"]).depends_on_batch:
        relevant["train"]["micro_batch_size"] = settings["train"]["micro_batch_size"]
    return relevant


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
    """YAML in which a duplicate key is an error and 3e-4 is a number."""

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


# PyYAML follows YAML 1.1, in which 3.0e-4 is a number and 3e-4 a string.
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
        raise RecipeError(f"recipe {shown} holds {kind_of(tree)}; expected groups of keys, see --print-config")
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
                f"override '{override}' sets a key of '{'.'.join(groups[: depth + 1])}', a value and not a group"
            )
    tree[leaf] = value
