"""Checkpoints: the state of a training loop between two steps, from which a run resumes bitwise equal.

    checkpoints/step-00000200/shard-*.safetensors    parameters and optimizer moments: torch's DCP, one file per rank
    checkpoints/step-00000200/state.json             step, settings that decide the result, sizes and SHA-256 hashes

A checkpoint is written to a temporary folder and renamed when complete, so a folder with the final name is complete
unless the disk damaged it. Nothing in it is pickled. Any number of ranks can read it; the order of the data and all
random numbers of a step follow from the seed and the step.
"""

from __future__ import annotations

import hashlib
import json
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
from mtp_ce.training.storage.atomic import Aside, remove_folder

FOLDER = "checkpoints"
STATE_FILE = "state.json"

# DCP warns on every save and load of a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# Version of the format, stored in every checkpoint: raise it when older checkpoints can no longer be read.
_FORMAT = 1

_PREFIX = "step-"


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: its folder.
        step: number of steps done.
        notes: plain values added by the writer.
    """

    folder: Path
    step: int
    notes: dict[str, Any]


@dataclass
class Checkpoints:
    """The checkpoints of one training loop.

    Attributes:
        folder: parent of all checkpoints; created with the first one.
        decided: settings that decide the result, by dotted key; a checkpoint with other values belongs to another run.
        keep: how many of the newest to keep.
        ranks: the ranks that save and load together.
        warn: receives one line about a checkpoint that could not be written or is skipped.
        written: called with the folder of every checkpoint written.
    """

    folder: Path
    decided: Mapping[str, Any]
    keep: int
    ranks: Ranks
    warn: Callable[[str], None]
    written: Callable[[Path], None] = lambda folder: None

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, notes: Callable[[], dict[str, Any]]) -> bool:
        """Write a checkpoint, and remove the oldest beyond `keep`.

        A full disk costs the checkpoint, not the run: it is a warning.

        Args:
            step: number of steps done.
            model: sharded or not; all ranks call this together.
            optimizer: over the model's parameters.
            notes: returns plain values to store with the checkpoint; called on rank 0 only.

        Returns:
            Whether it was written.
        """
        final = self.folder / f"{_PREFIX}{step:08d}"
        asides: list[Aside] = []  # on rank 0

        def begin() -> Path:
            self.folder.mkdir(parents=True, exist_ok=True)
            asides.append(Aside.folder(final))
            return asides[0].path

        try:
            path = self.ranks.share(self.ranks.lead(begin))
            writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
            dcp.save(state_tensors(model, optimizer), storage_writer=writer, no_dist=not self.ranks.sharded)
            self.ranks.lead(lambda: self._finish(step, asides[0], notes()))
        except (OSError, CheckpointException, LeaderFailedError) as error:
            cause = _cause(error)
            if not isinstance(cause, OSError | LeaderFailedError):
                raise cause from None
            self.warn(f"the checkpoint of step {step} could not be written ({_reason(cause)})")
            return False
        finally:
            for aside in asides:
                aside.discard()
        if self.ranks.leads:
            self.written(final)
        return True

    def newest(self) -> Checkpoint | None:
        """Return the newest valid checkpoint; None if there is none at all.

        Each newer checkpoint that is refused is named in a warning.

        Raises:
            RecipeError: checkpoints exist, and all are refused.
        """
        return self.ranks.share(self.ranks.lead(self._newest))

    def before(self, checkpoint: Checkpoint, problem: str) -> Checkpoint | None:
        """Return the newest valid checkpoint older than one that is valid and of no use; None if there is none.

        Args:
            checkpoint: the one that can't be used; it is named in a warning if there is an older one.
            problem: why, in one line.
        """

        def older() -> Checkpoint | None:
            found, refusals = self._find([folder for folder in self._folders() if folder.name < checkpoint.folder.name])
            for refusal in (
                [f"checkpoint {checkpoint.folder} can't be continued: {problem}", *refusals] if found else []
            ):
                self.warn(f"{refusal}; using an older one")
            return found

        return self.ranks.share(self.ranks.lead(older))

    def load(self, checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
        """Load a checkpoint's tensors into a model and its optimizer.

        Raises:
            RecipeError: the checkpoint holds other parameters than this model.
        """
        reader = HuggingFaceStorageReader(str(checkpoint.folder))
        stored = reader.read_metadata().state_dict_metadata
        ours = _saved(model)
        theirs = {name.removeprefix("model.") for name in stored if name.startswith("model.")}
        if ours.keys() != theirs:
            other = sorted(ours.keys() ^ theirs)[0]
            raise RecipeError(
                f"checkpoint {checkpoint.folder} belongs to another model: only one of the two has {other}"
            )
        tensors = {f"model.{name}": tensor for name, tensor in ours.items()}
        parameters = dict(model.named_parameters())
        for full in stored:
            if full.startswith("optimizer."):
                name, _, key = full.removeprefix("optimizer.").rpartition(".")
                parameter = parameters[name].detach()
                # AdamW's step counter is 0-d; its moments have the shape of the parameter.
                counter = torch.zeros((), dtype=torch.float32, device=parameter.device)
                tensors[full] = counter if key == "step" else torch.zeros_like(parameter)
                optimizer.state[parameters[name]][key] = tensors[full]
        dcp.load(tensors, storage_reader=reader, no_dist=not self.ranks.sharded)

    def _newest(self) -> Checkpoint | None:
        found, refusals = self._find(self._folders())
        if refusals and not found:
            raise RecipeError(f"{refusals[0]}; no other checkpoint in {self.folder} can be used")
        for refusal in refusals:
            self.warn(f"{refusal}; using an older one")
        return found

    def _folders(self) -> list[Path]:
        """Return the folders of all checkpoints, the newest first."""
        return sorted(self.folder.glob(f"{_PREFIX}*"), reverse=True)

    def _find(self, folders: list[Path]) -> tuple[Checkpoint | None, list[str]]:
        """Return the first valid checkpoint, and why each folder before it is refused."""
        refusals: list[str] = []
        for folder in folders:
            try:
                return read_checkpoint(folder, self.decided), refusals
            except CheckpointError as error:
                refusals.append(str(error))
        return None, refusals

    def _finish(self, step: int, aside: Aside, notes: dict[str, Any]) -> None:
        state = {
            "format": _FORMAT,
            "step": step,
            "ranks": self.ranks.size,
            "decided": dict(self.decided),
            "notes": notes,
            "files": _digests(aside.path),
        }
        text = json.dumps(state | {"sha256": _digest(state)}, indent=1)
        (aside.path / STATE_FILE).write_text(text, encoding="utf-8")
        # A run resumed from an earlier checkpoint writes this one again.
        aside.commit(replace=True)
        # One of a later step was refused when this run resumed: it takes no place from those that can be used.
        for old in [folder for folder in self._folders() if folder.name <= aside.final.name][self.keep :]:
            remove_folder(old)


def read_checkpoint(folder: Path, decided: Mapping[str, Any]) -> Checkpoint:
    """Verify a checkpoint's settings and the hash of every file.

    Args:
        folder: the checkpoint.
        decided: settings that decide the result of the run that reads it.

    Raises:
        CheckpointError: it is incomplete, damaged, or belongs to another run.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        sha256 = state.pop("sha256")
        step, theirs, notes, files = (state[name] for name in ("step", "decided", "notes", "files"))
        version = state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} has no readable {STATE_FILE} ({_reason(error)})") from None
    if version != _FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {version}; this version reads {_FORMAT}")
    if sha256 != _digest(state):
        raise CheckpointError(f"checkpoint {folder} is damaged: {STATE_FILE} differs from what was written")
    wanted = json.loads(json.dumps(dict(decided)))
    if other := sorted(name for name in wanted.keys() | theirs.keys() if wanted.get(name) != theirs.get(name)):
        if other == ["inputs"] and (change := _changed(theirs.get("inputs"), wanted.get("inputs"))):
            raise CheckpointError(f"checkpoint {folder} was trained on another {change}")
        if other == ["rows.halos"] and "rows.halos" not in theirs:
            raise CheckpointError(
                f"checkpoint {folder} is of a version whose packed rows lose the targets at their end; finish the run "
                "with that version, or start it again"
            )
        differences = ", ".join(f"{name} {theirs.get(name)} instead of {wanted.get(name)}" for name in other[:3])
        raise CheckpointError(f"checkpoint {folder} belongs to another run: {differences}")
    try:
        present = _digests(folder)
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} can't be read ({_reason(error)})") from None
    for name, stored in files.items():
        if name not in present:
            raise CheckpointError(f"checkpoint {folder} is incomplete: {name} is missing")
        if present[name] != stored:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} differs from what was written")
    if more := present.keys() - files.keys():
        raise CheckpointError(f"checkpoint {folder} is damaged: {sorted(more)[0]} does not belong to it")
    return Checkpoint(folder, step, notes)


def _changed(theirs: Any, ours: Any) -> str | None:
    """Say in words how the inputs of two runs differ; None where a hash would say no more."""
    if not isinstance(theirs, list) or not isinstance(ours, list):
        return None
    names = (
        "corpus: the documents of data.corpus or data.validation_corpus, or how they are read, have changed; resume "
        "with the documents that the run began with",
        "tokenizer; resume with the one that the run began with (data.tokenizer)",
    )
    return next((name for name, one, other in zip(names, theirs, ours, strict=False) if one != other), None)


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return what a checkpoint holds: parameters and buffers of a model, and the moments of its optimizer, by name."""
    tensors = {f"model.{name}": tensor for name, tensor in _saved(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _saved(model: nn.Module) -> dict[str, Tensor]:
    # FSDP keeps some parameters gathered after a validation; state_dict reshards them.
    return without_ties(model, model.state_dict())


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(folder.glob("*.safetensors"))

    def digest(path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with ThreadPoolExecutor() as threads:
        return {path.name: described for path, described in zip(paths, threads.map(digest, paths), strict=True)}


def _cause(error: BaseException) -> BaseException:
    """Return the exception that DCP wrapped, on this rank or another."""
    if isinstance(error, CheckpointException):
        cause: BaseException = next(iter(error.failures.values()))[0]
        return cause
    return error


def _reason(error: BaseException) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
