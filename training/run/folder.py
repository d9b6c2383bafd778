"""The run directory: its recipe, whether the run can be resumed, and whether it has finished. Needs no torch.

recipe.yaml    the recipe of the run
run.json       the torchrun launch that created it, and when the run finished
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
from mtp_ce.training.config.recipe import leaves, load_recipe, results_only, to_yaml
from mtp_ce.training.config.schema import EvaluationRecipe, Recipe
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.atomic import whole_folder

RECIPE_FILE = "recipe.yaml"
RUN_FILE = "run.json"

# Groups of a recipe that may differ in a resumed run: names, and what is measured or stored but not trained on.
_NOT_DECIDED = {"name", "description", "validation", "checkpoint", "tracking"}
# Paths may differ; their contents are hashed with the inputs of a checkpoint.
_PLACES = {"data.corpus", "data.reader", "data.tokenizer", "model.source"}


def decided_by(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide the trained parameters, by dotted key."""
    settings = results_only(recipe.model_dump(exclude=_NOT_DECIDED))
    return {key: value for key, value in leaves(settings) if key not in _PLACES}


def make_folder(output: Path, recipe: Recipe | EvaluationRecipe) -> None:
    """Create an output folder, and write the recipe into it.

    Raises:
        RecipeError: it exists already, or can't be created.
    """
    try:
        output.mkdir(parents=True)
        (output / RECIPE_FILE).write_text(to_yaml(recipe), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"output folder {output} can't be created: {error.strerror}; see --output") from None


def start_run(output: Path, recipe: Recipe) -> None:
    """Create the run directory; the run can be resumed from then on.

    Raises:
        RecipeError: as `make_folder`.
    """
    make_folder(output, recipe)
    _start(output)


def check_same(output: Path, recipe: Recipe) -> None:
    """Check that a recipe is that of the run it resumes, in every setting that decides the result.

    Raises:
        RecipeError: a setting differs.
    """
    # Tracking decides nothing, and its stored address may lack what is not stored.
    stored = load_recipe(str(output / RECIPE_FILE), ["tracking={}"])
    theirs, ours = decided_by(stored), decided_by(recipe)
    if other := sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)):
        key = other[0]
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        raise RecipeError(
            f"{key} is {ours.get(key)}, the run in {output} has {theirs.get(key)}{more}; a resumed run keeps its "
            "settings. To train its model with others, start a new run with "
            f"model.kind=pretrained model.source={output}"
        )


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run directory."""
    return (folder / RECIPE_FILE).is_file() and (folder / RUN_FILE).is_file()


def finished(folder: Path) -> str | None:
    """Return when a run finished, or None."""
    when: str | None = _read(folder).get("finished")
    return when


def finish(folder: Path) -> None:
    """Record that a run has finished."""
    _write(folder, {**_read(folder), "finished": datetime.now(UTC).isoformat(timespec="seconds")})


def restarted_run(runs: Path) -> Path | None:
    """Return the run that this torchrun launch started before it restarted its workers; None on the first start."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    mine = [
        path.parent for path in runs.glob(f"*/{RUN_FILE}") if is_run(path.parent) and _launch(path.parent) == launch
    ]
    return max(mine, key=lambda folder: (folder / RECIPE_FILE).stat().st_mtime, default=None)


def _launch(folder: Path) -> str | None:
    """Return the torchrun launch that created a run; None if it is unknown or run.json is unreadable."""
    try:
        launch: str | None = _read(folder).get("launch")
    except RecipeError:
        return None
    return launch


def fetch_run(address: str, output: Path) -> None:
    """Create a run directory from the newest of its checkpoints in S3; other ranks wait for rank 0.

    Args:
        address: s3://bucket/prefix/NAME, where `checkpoint.upload` stored them.
        output: the folder to create.

    Raises:
        RecipeError: the folder exists already, or S3 has no complete checkpoint there.
    """
    from mtp_ce.training.storage.folders import complete_folders, fetch_folder

    if os.environ.get("RANK", "0") != "0":
        while not is_run(output):
            time.sleep(0.5)
        return
    names = sorted(name for name in complete_folders("--resume", address) if name.startswith("step-"))
    if not names:
        raise RecipeError(f"--resume {address} has no complete checkpoint; give the s3:// address of a run directory")
    checkpoint = fetch_folder("--resume", f"{address.rstrip('/')}/{names[-1]}")
    try:
        recipe = yaml.safe_load(json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["notes"]["recipe"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise RecipeError(f"--resume {address}/{names[-1]} has no state.json with a recipe ({error})") from None
    refuse_class_paths(recipe, address)
    try:
        with whole_folder(output) as aside:
            shutil.copytree(checkpoint, aside / "checkpoints" / names[-1])
            (aside / RECIPE_FILE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
            _start(aside)
    except FileExistsError:
        raise RecipeError(f"output folder {output} exists already; name another one with --output") from None


def _start(folder: Path) -> None:
    _write(folder, {"launch": os.environ.get("TORCHELASTIC_RUN_ID"), "finished": None})


def _read(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"run {folder} has no readable {RUN_FILE} ({error})") from None
    return record


def _write(folder: Path, record: dict[str, Any]) -> None:
    aside = folder / f".{RUN_FILE}"
    aside.write_text(json.dumps(record, indent=2), encoding="utf-8")
    aside.replace(folder / RUN_FILE)
