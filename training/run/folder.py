"""The run directory: its recipe, whether the run can be resumed, and whether it has finished. Needs no torch.

recipe.yaml    the recipe of the run
run.json       id of the run, the launch that began it, when the run finished, and what a missing report needs
run.lock       locked by the process that trains here
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from mtp_ce.heads.kinds import KINDS
from mtp_ce.training.config.choice import refuse_class_paths
from mtp_ce.training.config.recipe import leaves, load_recipe, results_only, to_yaml
from mtp_ce.training.config.schema import EvaluationRecipe, Recipe
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.atomic import MANIFEST, remove_strays, whole_folder, write_file

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
RUN_FILE = "run.json"
LOCK_FILE = "run.lock"

# Groups of a recipe that may differ in a resumed run: names, and what is measured or stored but not trained on.
_NOT_DECIDED = {"name", "description", "validation", "checkpoint", "tracking"}
# Paths may differ; their contents are hashed with the inputs of a checkpoint.
_PLACES = {"data.corpus", "data.reader", "data.tokenizer", "model.source"}
# Keys that runs of earlier versions lack, at the values with which those versions trained.
_ADDED = {
    "model.mtp.head_reduction": "live",
    "model.mtp.shared": False,
    "model.mtp.targets": "text",
    "data.noise": None,
}


def decided_by(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide the trained parameters, by dotted key, and the form of the heads."""
    settings = results_only(recipe.model_dump(exclude=_NOT_DECIDED))
    added = _ADDED.items()
    decided = {key: value for key, value in leaves(settings) if key not in _PLACES and (key, value) not in added}
    known = KINDS.get(recipe.model.mtp.kind)
    return decided | ({"heads.format": known.format} if known is not None and known.format > 1 else {})


def make_folder(output: Path, recipe: Recipe | EvaluationRecipe, **files: str) -> None:
    """Create an output folder with the recipe in it, and further files by name.

    Raises:
        RecipeError: it exists already, or can't be created.
    """
    try:
        with whole_folder(output, manifest=False) as aside:
            (aside / RECIPE_FILE).write_text(to_yaml(recipe), encoding="utf-8")
            for name, text in files.items():
                (aside / name).write_text(text, encoding="utf-8")
    except FileExistsError:
        raise RecipeError(f"output folder {output} exists already; name another one with --output") from None
    except OSError as error:
        raise RecipeError(f"output folder {output} can't be created: {error.strerror}; see --output") from None


def start_run(output: Path, recipe: Recipe) -> None:
    """Create the run directory; the run can be resumed from then on.

    Raises:
        RecipeError: as `make_folder`.
    """
    make_folder(output, recipe, **{RUN_FILE: _new_record()})


@contextmanager
def locked_run(output: Path) -> Iterator[None]:
    """Let one process at a time train in a run directory, and remove what dead processes left in it.

    The lock ends with the process that holds it, however that ends.

    Raises:
        RecipeError: another process holds it.
    """
    with (output / LOCK_FILE).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise RecipeError(f"run {output} is being trained by {holder}; wait for it, or stop it first") from None
        except OSError as error:
            logger.warning("run %s is not locked (%s): start no second process in it", output, error.strerror)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        _remove_strays_below(output)
        yield
        # Again at the end of a finished run: of what a passing error of the disk kept from being deleted.
        _remove_strays_below(output)


def _remove_strays_below(folder: Path) -> None:
    for inside in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        remove_strays(inside)


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


def finish(folder: Path, report: dict[str, Any]) -> None:
    """Record that a run has finished: its model is saved.

    Args:
        folder: the run directory.
        report: what the report needs, plain values; kept until `end_report`.
    """
    done = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "report": report,
        "report_sha256": _hash(report),
    }
    record = {**_read(folder), **done}
    write_file(folder / RUN_FILE, json.dumps(record, indent=2))


def pending_report(folder: Path) -> dict[str, Any] | None:
    """Return what the report of a finished run needs, if it is missing; None if it is complete.

    Raises:
        RecipeError: run.json is damaged.
    """
    record = _read(folder)
    report: dict[str, Any] | None = record.get("report")
    if report and record.get("report_sha256") != _hash(report):
        raise RecipeError(
            f"run {folder} has a {RUN_FILE} that differs from what was written; its model is in {folder}/model, and "
            f"eval-mtp {folder} evaluates it"
        )
    return report


def end_report(folder: Path) -> None:
    """Record that the report of a run is complete."""
    write_file(folder / RUN_FILE, json.dumps({**_read(folder), "report": None}, indent=2))


def _hash(report: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(report).encode()).hexdigest()


def restarted_run(runs: Path) -> Path | None:
    """Return the run that this torchrun launch began before it restarted its workers; None on the first start."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    launch, ours = _launch(), []
    for folder in (path.parent for path in runs.glob(f"*/{RUN_FILE}") if is_run(path.parent)):
        try:
            theirs = _read(folder).get("launch")
        except RecipeError:
            continue
        if isinstance(theirs, dict) and _is_ours(theirs, launch):
            ours.append(folder)
    return max(ours, key=lambda folder: (folder / RECIPE_FILE).stat().st_mtime, default=None)


def _launch() -> dict[str, Any]:
    """Return what identifies this launch: torchrun's id, and the agent that started this worker, with its start time.

    An id alone does not: without --rdzv-id it is "none" in every launch.
    """
    return {
        "id": os.environ.get("TORCHELASTIC_RUN_ID"),
        "agent": f"{os.getppid()} on {socket.gethostname()}",
        "agent_started": _started(os.getppid()),
    }


def _is_ours(theirs: dict[str, Any], launch: dict[str, Any]) -> bool:
    """Return whether a run was begun by this launch: by the same agent, or by another node's under the same id.

    Rank 0 can move to another node with a restart. Its run then began after this node's agent.
    """
    if all(theirs.get(name) == launch[name] for name in ("id", "agent", "agent_started")):
        return True
    named = launch["id"] not in (None, "", "none") and theirs.get("id") == launch["id"]
    return named and (theirs.get("began") or 0) >= (launch["agent_started"] or math.inf)


def _started(process: int) -> float | None:
    """Return when a process was started, in seconds since the epoch; None where the system has no /proc."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        # proc(5): starttime is the 22nd field, in clock ticks after boot; 2 come before the name's ")".
        return int(booted.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return None


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
        with whole_folder(output, manifest=False) as aside:
            hidden = shutil.ignore_patterns(MANIFEST)
            shutil.copytree(checkpoint, aside / "checkpoints" / names[-1], ignore=hidden)
            (aside / RECIPE_FILE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
            (aside / RUN_FILE).write_text(_new_record(), encoding="utf-8")
    except FileExistsError:
        raise RecipeError(f"output folder {output} exists already; name another one with --output") from None


def _new_record() -> str:
    """Return run.json of a run that begins."""
    record = {"id": uuid.uuid4().hex, "launch": _launch() | {"began": time.time()}, "finished": None}
    return json.dumps(record, indent=2)


def _read(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"run {folder} has no readable {RUN_FILE} ({error})") from None
    if not isinstance(record, dict):
        raise RecipeError(f"run {folder} has no readable {RUN_FILE} (it holds no object)")
    return record
