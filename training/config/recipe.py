"""From a YAML file and `a.b=c` overrides to a validated recipe, and back.

    recipe = load_recipe("tiny", ["train.steps=100", "optimizer.lr=3e-4"])

Nothing here imports torch, so that a mistake is reported within a second. An unknown key, a value of the wrong type or
out of range, a duplicate key: each raises one `RecipeError` whose message is one line.
"""

from __future__ import annotations

import copy
import difflib
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from mtp_ce.training.addresses import is_shortened, shown, shown_values
from mtp_ce.training.config.choice import refuse_class_paths
from mtp_ce.training.config.explain import explain, kind_of
from mtp_ce.training.config.overrides import apply_override, follow_choices, is_given, with_meaning
from mtp_ce.training.config.schema import EvaluationRecipe, Recipe
from mtp_ce.training.config.scorers.options import ScorerConfig
from mtp_ce.training.config.scorers.table import AnyScorer
from mtp_ce.training.config.words import MAX_CHARACTERS, read_yaml, spelling, value_of
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.paths import user_path
from mtp_ce.training.storage.s3 import SET_CREDENTIALS, is_s3

_SCORER: TypeAdapter[ScorerConfig] = TypeAdapter(AnyScorer)

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe | EvaluationRecipe)

# Keys of a loop that change where, how fast and in how much memory it computes, not its results.
_NOT_RESULTS = {"device", "micro_batch_size", "log_every", "activation_checkpointing", "cpu_offload", "tensor_parallel"}

# Ends of the keys that choose the class of their group.
_CHOOSERS = (".name", ".kind")

RECIPES_FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(RECIPES_FOLDER.glob("*.yaml"))}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, validate the result.

    Args:
        name_or_path: a shipped recipe's name, the path of a YAML file, or its s3:// address.
        overrides: `a.b=c`, as in `apply_override`; a later one wins over an earlier one.

    Raises:
        RecipeError: the file is missing or not YAML, a key or value is wrong, or a recipe in S3 names a class.
    """
    tree = _parse(_find(name_or_path), name_or_path)
    if is_s3(name_or_path):
        refuse_class_paths(tree, name_or_path)
    return _validate(Recipe, tree, overrides)


def load_arms(name_or_path: str, overrides: Sequence[str], arms: Sequence[str]) -> dict[str, Recipe]:
    """Read the recipes of the arms that a comparison has beside its own.

    Args:
        name_or_path: as in `load_recipe`.
        overrides: of all arms.
        arms: the overrides of each arm in one text, as in a shell.

    Returns:
        The recipe of every arm, by a name that is made of its overrides and can be a folder.

    Raises:
        RecipeError: as `load_recipe`; or an arm has no override, an open quote, or is given twice.
    """
    found = {}
    for arm in arms:
        try:
            own = shlex.split(arm)
        except ValueError as error:
            raise RecipeError(f"--arm {arm}: {error}") from None
        if not own:
            raise RecipeError("--arm is empty; expected overrides of the scorer, such as scorer.temperature=2.0")
        name = re.sub(r"[^\w.=,+-]+", "_", ",".join(override.removeprefix("scorer.") for override in own))
        if name in found:
            raise RecipeError(f"--arm {name} is given twice")
        found[name] = load_recipe(name_or_path, [*overrides, *own])
    return found


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
    before, given = copy.deepcopy(tree), set[str]()
    # What chooses a group comes first, so that the types of its keys are known whatever the order.
    choosing = [override for override in overrides if override.partition("=")[0].endswith(_CHOOSERS)]
    for override in [*choosing, *overrides]:
        given.add(apply_override(schema, tree, override))
    follow_choices([schema], before, tree, given)
    _drop_vocabulary(before, tree, given)
    tree = with_meaning(tree, [schema])
    try:
        recipe = cast(AnyRecipe, schema.model_validate(tree))
    except ValidationError as error:
        # A misspelt group is reported as unknown and as missing; the unknown key explains both.
        first, *others = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        more = f" (and {len(others)} more)" if others else ""
        raise RecipeError(" ".join(explain(schema, tree, first).split()) + more) from None
    _check_addresses(recipe)
    return recipe


def _drop_vocabulary(before: Mapping[str, Any], tree: dict[str, Any], given: Collection[str]) -> None:
    """Drop a recipe's data.vocab_size where an override has made its model a pretrained one, which has its own."""
    was, now = (group.get("model") for group in (before, tree))
    if not (isinstance(was, Mapping) and isinstance(now, Mapping) and isinstance(tree.get("data"), dict)):
        return
    if was.get("kind") != now.get("kind") == "pretrained" and not is_given("data.vocab_size", given):
        tree["data"].pop("vocab_size", None)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that would be read as something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        quoted = not isinstance(value_of(data), str) or spelling(data) is not None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="'" if quoted else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def to_yaml(recipe: BaseModel) -> str:
    """Format every key of a recipe, defaults included, as YAML for `load_recipe`, with addresses shortened."""
    return yaml.dump(shown_values(recipe.model_dump()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


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
    path = user_path("the recipe", name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"recipe {name_or_path} is a folder; expected a YAML file")
    near = difflib.get_close_matches(name_or_path, shipped, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise RecipeError(f"recipe '{name_or_path}' is neither a file nor a shipped recipe ({', '.join(shipped)}){hint}")


def _parse(path: Path, shown: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            # One character more than is allowed, in bytes of which a character has at most four.
            text = file.read(4 * (MAX_CHARACTERS + 1)).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {shown} can't be read: {error}") from None
    tree = read_yaml(text, f"recipe {shown}")
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {shown} holds {kind_of(tree)}; expected groups of keys, see --print-config")
    return tree
