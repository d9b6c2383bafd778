"""A run's folder from the outside: whether it can be gone on with, and by which recipe. Nothing here needs torch.

recipe.yaml    what the run does
run.json       which launch of torchrun made it, and when it finished
"""

from __future__ import annotations

import json
import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from mtp_ce.training.config.choice import refuse_class_paths
from mtp_ce.training.config.recipe import leaves, load_recipe, results_only, to_yaml, without_password
from mtp_ce.training.config.schema import EvaluationRecipe, Recipe
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.atomic import whole_folder

RECIPE_FILE = "recipe.yaml"
RUN_FILE = "run.json"

# What is in a recipe and may differ when its run is gone on with: names, and what is looked at but not learnt from.
_NOT_DECIDED = {"name", "description", "validation", "checkpoint", "tracking"}
# Where something lies is no matter; what lies there is hashed with the inputs of a checkpoint.
_PLACES = {"data.corpus", "data.tokenizer", "model.source"}


def decided_by(recipe: Recipe) -> dict[str, Any]:
    """Give what decides the parameters that come out, by dotted key."""
    settings = results_only(recipe.model_dump(exclude=_NOT_DECIDED))
    return {key: value for key, value in leaves(settings) if key not in _PLACES}


def make_folder(output: Path, recipe: Recipe | EvaluationRecipe) -> None:
    """Make a folder for what a recipe is to give, and write the recipe into it.

    Raises:
        RecipeError: it is there already, or can't be made.
    """
    try:
        output.mkdir(parents=True)
        (output / RECIPE_FILE).write_text(to_yaml(without_password(recipe)), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"output folder {output} can't be made: {error.strerror}; see --output") from None


def begin_run(output: Path, recipe: Recipe) -> None:
    """Make the folder of a run, which can be gone on with from then on.

    Raises:
        RecipeError: as `make_folder`.
    """
    make_folder(output, recipe)
    _begin(output)


def check_same(output: Path, recipe: Recipe) -> None:
    """Compare a recipe with that of the run that it is to go on with.

    Raises:
        RecipeError: something that decides the result differs.
    """
    theirs, ours = decided_by(load_recipe(str(output / RECIPE_FILE))), decided_by(recipe)
    if other := sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)):
        key = other[0]
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        raise RecipeError(
            f"{key} is {ours.get(key)}, the run in {output} has {theirs.get(key)}{more}; a run goes on as it began. "
            f"To train its model differently, begin a new run with model.kind=pretrained model.source={output}"
        )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / RECIPE_FILE).is_file() and (folder / RUN_FILE).is_file()


def finished(folder: Path) -> str | None:
    """When a run finished, or None."""
    when: str | None = _read(folder).get("finished")
    return when


def finish(folder: Path) -> None:
    """Note that a run has finished."""
    _write(folder, {**_read(folder), "finished": datetime.now(UTC).isoformat(timespec="seconds")})


def restarted_run(runs: Path) -> Path | None:
    """Find the run that this launch of torchrun began before it restarted its workers; None where it did not."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    mine = [
        path.parent for path in runs.glob(f"*/{RUN_FILE}") if is_run(path.parent) and _launch(path.parent) == launch
    ]
    return max(mine, key=lambda folder: (folder / RECIPE_FILE).stat().st_mtime, default=None)


def _launch(folder: Path) -> str | None:
    """Which launch of torchrun made a run; None where it does not say, whatever else is wrong with it."""
    try:
        launch: str | None = _read(folder).get("launch")
    except RecipeError:
        return None
    return launch


def fetch_run(address: str, output: Path) -> None:
    """Make a run's folder from the newest of its checkpoints in S3; of several ranks the others wait for the first.

    Args:
        address: s3://bucket/prefix/NAME, where `checkpoint.upload` has put them.
        output: the folder to make.

    Raises:
        RecipeError: the folder is there already, or S3 has no whole checkpoint there.
    """
    from mtp_ce.training.storage.folders import complete_folders, fetch_folder

    if os.environ.get("RANK", "0") != "0":
        while not is_run(output):
            time.sleep(0.5)
        return
    names = sorted(name for name in complete_folders("--resume", address) if name.startswith("step-"))
    if not names:
        raise RecipeError(f"--resume {address} has no whole checkpoint; give the s3:// address of a run's folder")
    found = fetch_folder("--resume", f"{address.rstrip('/')}/{names[-1]}")
    try:
        recipe = yaml.safe_load(json.loads((found / "state.json").read_text(encoding="utf-8"))["notes"]["recipe"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise RecipeError(f"--resume {address}/{names[-1]} has no state.json with a recipe ({error})") from None
    refuse_class_paths(recipe, address)
    try:
        with whole_folder(output) as aside:
            shutil.copytree(found, aside / "checkpoints" / names[-1])
            (aside / RECIPE_FILE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
            _begin(aside)
    except FileExistsError:
        raise RecipeError(f"output folder {output} exists and is left alone; name another one with --output") from None


def _begin(folder: Path) -> None:
    _write(folder, {"launch": os.environ.get("TORCHELASTIC_RUN_ID"), "finished": None})


def _read(folder: Path) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"run {folder} has no {RUN_FILE} that can be read ({error})") from None
    return said


def _write(folder: Path, said: dict[str, Any]) -> None:
    aside = folder / f".{RUN_FILE}"
    aside.write_text(json.dumps(said, indent=2), encoding="utf-8")
    aside.replace(folder / RUN_FILE)
