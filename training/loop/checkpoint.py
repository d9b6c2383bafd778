"""The state of a loop between two steps, from which it goes on to the same last bit.

    checkpoints/step-00000200/shard-*.safetensors    parameters and moments of the optimizer: torch's DCP, a file a rank
    checkpoints/step-00000200/state.json             the step, what decides the run, size and SHA-256 of every file

A checkpoint is written aside and renamed when it is whole, so that one with its name is complete unless a disk has
spoilt it. Nothing in it is pickled. It can be read by any number of ranks; the order of the data and all random numbers
of a step follow from the seed and the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from mtp_ce.training.errors import LeaderFailedError, RecipeError
from mtp_ce.training.loop.ranks import Ranks, without_ties

FOLDER = "checkpoints"
STATE_FILE = "state.json"

# It is said each time that one process saves or loads for itself.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# Part of every checkpoint: raise it when one that was written before can't be read any more.
_FORMAT = 1

_PREFIX = "step-"


class CheckpointError(ValueError):
    """A checkpoint is incomplete, spoilt, or of another run."""


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole.

    Attributes:
        folder: where.
        step: how many steps were done.
        notes: what its writer has added, as plain values.
    """

    folder: Path
    step: int
    notes: dict[str, Any]


@dataclass
class Checkpoints:
    """The checkpoints of one loop.

    Attributes:
        folder: holds them all; made with the first one.
        decided: what decides the run, by dotted key; one with other values is of another run.
        keep: how many to keep, the newest.
        ranks: who takes part.
        warn: takes a line about one that could not be written, or is left alone.
        written: takes the folder of one that was written.
    """

    folder: Path
    decided: Mapping[str, Any]
    keep: int
    ranks: Ranks
    warn: Callable[[str], None]
    written: Callable[[Path], None] = lambda folder: None

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, notes: Callable[[], dict[str, Any]]) -> bool:
        """Write a checkpoint, and remove the oldest beyond `keep`.

        A disk that is full costs the checkpoint and not the run: that is a warning.

        Args:
            step: how many steps are done.
            model: sharded or not; all ranks call this together.
            optimizer: over the model's parameters.
            notes: gives plain values to be found with it; asked on rank 0.

        Returns:
            Whether it was written.
        """
        final = self.folder / f"{_PREFIX}{step:08d}"
        aside = self.folder / f".{final.name}"
        try:
            self.ranks.lead(lambda: _empty(aside))
            writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
            dcp.save(_tensors(model, optimizer), storage_writer=writer, no_dist=not self.ranks.sharded)
            self.ranks.lead(lambda: self._finish(step, aside, final, notes()))
        except (OSError, CheckpointException, LeaderFailedError) as error:
            cause = _cause(error)
            if not isinstance(cause, OSError | LeaderFailedError):
                raise cause from None
            self.warn(f"the checkpoint of step {step} could not be written ({_reason(cause)})")
            if self.ranks.leads:
                shutil.rmtree(aside, ignore_errors=True)
            return False
        if self.ranks.leads:
            self.written(final)
        return True

    def newest(self) -> Checkpoint | None:
        """Find the newest one that is whole; None where there is none at all.

        Every one that is refused on the way is named in a warning.

        Raises:
            RecipeError: there are some, and all are refused.
        """
        return self.ranks.share(self.ranks.lead(self._newest))

    def load(self, found: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
        """Put a checkpoint's values into a model and its optimizer, which are of the same run.

        Raises:
            RecipeError: it has not the parameters of this model.
        """
        reader = HuggingFaceStorageReader(str(found.folder))
        stored = reader.read_metadata().state_dict_metadata
        ours = _saved(model)
        theirs = {name.removeprefix("model.") for name in stored if name.startswith("model.")}
        if ours.keys() != theirs:
            other = sorted(ours.keys() ^ theirs)[0]
            raise RecipeError(f"checkpoint {found.folder} is of another model: only one of both has {other}")
        tensors = {f"model.{name}": tensor for name, tensor in ours.items()}
        parameters = dict(model.named_parameters())
        for full in stored:
            if full.startswith("optimizer."):
                name, _, key = full.removeprefix("optimizer.").rpartition(".")
                parameter = parameters[name].detach()
                # A parameter's number of steps has no dimensions; what else there is has the parameter's.
                one = torch.zeros((), dtype=torch.float32, device=parameter.device)
                tensors[full] = one if key == "step" else torch.zeros_like(parameter)
                optimizer.state[parameters[name]][key] = tensors[full]
        dcp.load(tensors, storage_reader=reader, no_dist=not self.ranks.sharded)

    def _newest(self) -> Checkpoint | None:
        found = sorted(self.folder.glob(f"{_PREFIX}*"), reverse=True)
        refusals = []
        for folder in found:
            try:
                checkpoint = read_checkpoint(folder, self.decided)
            except CheckpointError as error:
                refusals.append(str(error))
                continue
            for refusal in refusals:
                self.warn(f"{refusal}; an older one is used")
            return checkpoint
        if refusals:
            raise RecipeError(f"{refusals[0]}; no other checkpoint in {self.folder} can be used")
        return None

    def _finish(self, step: int, aside: Path, final: Path, notes: dict[str, Any]) -> None:
        state = {
            "format": _FORMAT,
            "step": step,
            "ranks": self.ranks.size,
            "decided": dict(self.decided),
            "notes": notes,
            "files": _digests(aside),
        }
        (aside / STATE_FILE).write_text(json.dumps(state | {"sha256": _digest(state)}, indent=1), encoding="utf-8")
        for path in aside.iterdir():
            _to_disk(path)
        # There is one already where an earlier one was gone back to.
        _remove(final)
        aside.rename(final)
        _to_disk(self.folder)
        for old in sorted(self.folder.glob(f"{_PREFIX}*"), reverse=True)[self.keep :]:
            _remove(old)


def read_checkpoint(folder: Path, decided: Mapping[str, Any]) -> Checkpoint:
    """Check a checkpoint, byte by byte.

    Args:
        folder: where it is.
        decided: what decides the run that wants it.

    Raises:
        CheckpointError: it is incomplete, spoilt, or of another run.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        written = state.pop("sha256")
        step, theirs, notes, files = (state[name] for name in ("step", "decided", "notes", "files"))
        known = state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} has no {STATE_FILE} that can be read ({_reason(error)})") from None
    if known != _FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {known}; this version reads {_FORMAT}")
    if written != _digest(state):
        raise CheckpointError(f"checkpoint {folder} is spoilt: {STATE_FILE} is not what was written")
    wanted = json.loads(json.dumps(dict(decided)))
    if other := sorted(name for name in wanted.keys() | theirs.keys() if wanted.get(name) != theirs.get(name)):
        said = ", ".join(f"{name} {theirs.get(name)} instead of {wanted.get(name)}" for name in other[:3])
        raise CheckpointError(f"checkpoint {folder} is of another run: {said}")
    try:
        present = _digests(folder)
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} can't be read ({_reason(error)})") from None
    for name, stored in files.items():
        if name not in present:
            raise CheckpointError(f"checkpoint {folder} is incomplete: {name} is missing")
        if present[name] != stored:
            raise CheckpointError(f"checkpoint {folder} is spoilt: {name} is not what was written")
    if more := present.keys() - files.keys():
        raise CheckpointError(f"checkpoint {folder} is spoilt: {sorted(more)[0]} was not written with it")
    return Checkpoint(folder, step, notes)


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in _saved(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _saved(model: nn.Module) -> dict[str, Tensor]:
    # After a validation FSDP still holds some parameters gathered; state_dict has it give them up.
    return without_ties(model, model.state_dict())


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(folder.glob("*.safetensors"))

    def digest(path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with ThreadPoolExecutor() as threads:
        return {path.name: found for path, found in zip(paths, threads.map(digest, paths), strict=True)}


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; one that is half removed does not have its name any more."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old")))


def _to_disk(path: Path) -> None:
    """Have the kernel write a file or a folder's entries out."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> BaseException:
    """What DCP has wrapped up, on this rank or another one."""
    if isinstance(error, CheckpointException):
        cause: BaseException = next(iter(error.failures.values()))[0]
        return cause
    return error


def _reason(error: BaseException) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
