"""The MTP module that a checkpoint came with, which transformers does not load: carried over into what is saved.

    mtp.*, model.mtp.*, model.mtp_layers.*, ...      Qwen, MiMo, Nemotron, EXAONE, ...
    model.layers.{N+k}.*, with a projection eh_proj  DeepSeek, GLM, ...: behind the N layers of the model

Such tensors are absent from the model in memory, so that `save_pretrained` would lose them, while the configuration
goes on to promise them (num_nextn_predict_layers). Here they are found in the files that the model was loaded from, by
name, and copied on save into one more shard, behind those that transformers wrote:

    model-00001-of-00002.safetensors    model.safetensors, renamed: where it exists, transformers reads no index
    model-00002-of-00002.safetensors    the MTP module, unchanged
    model.safetensors.index.json        all names; {"metadata": {"mtp_module": "stale"}} where the trunk was trained
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from mtp_ce.heads.modules.table import stored_modules

_NAMED = re.compile(r"(^|\.)(mtp|nextn)")
_LAYER = re.compile(r"((?:^|.*\.)layers\.(\d+)\.)")
# Only a layer of an MTP module joins two inputs, or has an output layer.
_MARK = re.compile(r"(^|\.)layers\.\d+\.(.*\.)?(eh_proj|shared_head)\.")
# Keys of a configuration that say how many modules there are.
_COUNT = re.compile(r"(mtp|nextn)\w*_(layers|modules)$")
_CONFIG = "config.json"
_STATE, _STALE = "mtp_module", "stale"


def mtp_names(names: Collection[str]) -> list[str]:
    """Return the names of an MTP module's tensors among those of a checkpoint, sorted."""
    layers = {match[1] for name in names if _MARK.search(name) and (match := _LAYER.match(name))}
    return sorted(
        name for name in names if _NAMED.search(name) or ((match := _LAYER.match(name)) and match[1] in layers)
    )


class CarriedModuleLostError(FileNotFoundError):
    """The files that an MTP module is to be carried over from can't be found any more.

    Attributes:
        source: where they were.
    """

    def __init__(self, message: str, source: str) -> None:
        super().__init__(message)
        self.source = source


@dataclass(frozen=True)
class CarriedModule:
    """The MTP module of the files that a model was loaded from; without names where there is none.

    Attributes:
        source: the folder, or the name on the hub; empty for a model that was built and not loaded.
        names: of its tensors.
        found: whether the files could be found.
    """

    source: str
    names: tuple[str, ...] = ()
    found: bool = True

    @classmethod
    def of(cls, causal: Any) -> CarriedModule:
        """Look for the module of a causal language model of transformers; no tensor is read.

        Args:
            causal: the model, without PEFT's wrapper.
        """
        # from_pretrained alone sets the attribute: a configuration has a path, too, where a model was built from it.
        source = str(getattr(causal, "source_folder", None) or causal.name_or_path or "")
        if not source or not hasattr(causal, "_weight_conversions"):
            return cls("")
        if Path(source).is_dir():
            source = str(Path(source).absolute())
        files = _files(source)
        if files is None:
            patterns = causal._keys_to_ignore_on_load_unexpected or ()
            expects = any(_promised(causal.config.to_dict()).values()) or any("mtp" in pattern for pattern in patterns)
            return cls(source if expects else "", found=not expects)
        return cls(source, _module_names(files, causal))

    @classmethod
    def at(cls, folder: str | Path, causal: Any) -> CarriedModule:
        """Look for the module in a folder of a model's files, such as a checkpoint.

        Args:
            folder: the folder.
            causal: the model, without PEFT's wrapper.
        """
        return cls(str(folder), _module_names(_files(folder) or {}, causal))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors of the files; those that are not there are left out."""
        files = _files(self.source) or {}
        return _read_tensors(files, [name for name in names if name in files])

    def without(self, names: Collection[str]) -> CarriedModule:
        """Return the rest, without tensors that are trained and written by others."""
        return replace(self, names=tuple(name for name in self.names if name not in set(names)))

    def report(self, causal: Any, *, trained: bool) -> None:
        """Warn of what transformers did not load, and what becomes of it; on the first rank.

        Args:
            causal: the model.
            trained: whether it may be trained, so that the module falls behind it.
        """
        if (not self.names and self.found) or os.environ.get("RANK", "0") != "0":
            return
        message = f"{self._lost(causal)}. Until then save_pretrained is refused."
        if self.names:
            fate = "save_pretrained carries it over unchanged"
            if stored_modules(self.names, causal.config.get_text_config().num_hidden_layers):
                fate = f"heads='native' trains it; {fate}"
            if _is_stale(self.source):
                fate += "; it is stale, because the model was trained after it, and drafts worse"
            elif trained:
                fate += "; once the model is trained, which trunk='joint' does, it is stale and drafts worse"
            if self.is_dropped(causal):
                fate = "save_pretrained leaves it out, because the model's configuration has 0 such modules"
            message = (
                f"{self.source} has an MTP module of {len(self.names)} tensors that transformers does not load, "
                f"{self.names[0]} to {self.names[-1]}. {fate}."
            )
        elif self.is_dropped(causal):
            return
        warnings.warn(message, stacklevel=3)

    @contextmanager
    def carried_into(
        self,
        causal: Any,
        folder: str | Path,
        *,
        stale: bool,
        trained: Mapping[str, Tensor] | None = None,
        variant: str | None = None,
        tensors: bool = True,
    ) -> Iterator[None]:
        """Add the module to the model that is saved into `folder` inside the block.

        The configuration that is written promises a module where there is one, and only there.

        Args:
            causal: the model in memory.
            folder: may be the one that the module comes from.
            stale: whether the trunk was trained since the module was.
            trained: tensors of the module that were trained with the trunk, and are written in place of those in the
                files.
            variant: of `save_pretrained`.
            tensors: whether the model's tensors are written; False: its configuration alone.

        Raises:
            CarriedModuleLostError: the files of the module can't be found any more. Nothing is written.
            ValueError: the model has another number of layers than they have. Nothing is written.
        """
        folder = Path(folder)
        promised: dict[tuple[str, ...], int] = {}
        staged, source, added, trained = None, self.source, {}, trained or {}
        if tensors and (self.names or not self.found) and not self.is_dropped(causal):
            source, files, names = self._now(causal)
            added = _read_tensors(files, (name for name in names if name not in trained))
            stale = stale or _is_stale(source)
        if added or (tensors and trained):
            folder.mkdir(parents=True, exist_ok=True)
            promised = _promised(_read(source, _CONFIG)) or _promised(causal.config.to_dict())
            # Before the block, which may overwrite the files that they come from.
            staged = folder / "mtp_module.safetensors.part"
            save_file({**added, **trained}, staged, metadata={"format": "pt"})
        try:
            yield
            if tensors:  # what was trained with the trunk is not stale
                _write_index(folder, variant, staged, {_STATE: _STALE} if stale and added else {})
        finally:
            if staged:
                staged.unlink(missing_ok=True)
        if not staged and not mtp_names(_files(folder) or ()):
            promised = dict.fromkeys((key for key, n in _promised(causal.config.to_dict()).items() if n), 0)
        _promise(folder / _CONFIG, promised, overwrite=not staged)

    def is_dropped(self, causal: Any) -> bool:
        """Return whether the user has set the number of modules to 0 in the model's configuration."""
        now = _promised(causal.config.to_dict()).values()
        before = _promised(_read(self.source, _CONFIG)).values()
        return bool(now) and not any(now) and (any(before) or not before)

    def _now(self, causal: Any) -> tuple[str, dict[str, Path], tuple[str, ...]]:
        """Return the source, the files of all its tensors, and the module's names.

        Raises:
            CarriedModuleLostError, ValueError: see `carried_into`.
        """
        now = CarriedModule.of(causal)
        all_names = {*now.names, *self.names}  # those that are trained included
        if self.names:  # those that were missing from the model before it was sharded
            now = replace(now, names=self.names)
        files = _files(now.source) if now.found else None
        if files is None or any(name not in files or not files[name].exists() for name in now.names):
            raise CarriedModuleLostError(f"{self._lost(causal)}.", now.source)
        layers = causal.config.get_text_config().num_hidden_layers
        numbers = {int(m[2]) for name in all_names if not _NAMED.search(name) and (m := _LAYER.match(name))}
        if numbers and min(numbers) != layers:
            raise ValueError(
                f"{now.source} has an MTP module behind {min(numbers)} layers ({now.names[0]}), and the model has "
                f"{layers}; expected as many, or no module: {_drops(causal)}."
            )
        return now.source, files, now.names

    def _lost(self, causal: Any) -> str:
        what = f"the {len(self.names)} tensors" if self.names else "the tensors"
        return (
            f"{self.source} can't be found or lacks safetensors files, from which {what} of the model's MTP module are "
            "carried over when it is saved, because transformers does not load them; expected them there, or their "
            f"folder in wrapper.causal.name_or_path, or no module: {_drops(causal)}"
        )


def _drops(causal: Any) -> str:
    """Return what the user can set to leave the module out."""
    counts = [".".join(key) for key, number in _promised(causal.config.to_dict()).items() if number]
    names = counts or ["get_text_config().num_nextn_predict_layers"]
    return f"{' = '.join(f'wrapper.causal.config.{name}' for name in names)} = 0 drops it"


def promise_none(config: Any) -> None:
    """Set the numbers of MTP modules in a configuration of transformers to 0.

    Args:
        config: of a model of another kind, which is trained from a checkpoint and has no module.
    """
    for part in (config, config.get_text_config()):
        for key in _promised(vars(part)):
            if len(key) == 1:
                setattr(part, key[0], 0)


def _files(source: str | Path) -> dict[str, Path] | None:
    """Return the file of each tensor of a saved model, as transformers reads them; None where there are none."""
    if whole := _located(source, "model.safetensors"):
        with safe_open(whole, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), whole)
    if index := _located(source, "model.safetensors.index.json"):
        return {name: index.parent / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    return None


def _located(source: str | Path, name: str) -> Path | None:
    # Not from the hub again: what the model was loaded from is on this machine.
    try:
        path = cached_file(str(source), name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return Path(path) if path else None


def _read(source: str | Path, name: str) -> dict[str, Any]:
    file = _located(source, name)
    content = json.loads(file.read_bytes()) if file else {}
    return content if isinstance(content, dict) else {}


def _is_stale(source: str) -> bool:
    if _located(source, "model.safetensors"):
        return False
    return (_read(source, "model.safetensors.index.json").get("metadata") or {}).get(_STATE) == _STALE


def _promised(config: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Return the numbers of modules in a configuration, by their keys from the outside in."""
    found: dict[tuple[str, ...], int] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _promised(value, (*path, key))
        elif isinstance(value, int) and not isinstance(value, bool) and _COUNT.search(str(key)):
            found[(*path, key)] = value
    return found


def _promise(file: Path, promised: dict[tuple[str, ...], int], *, overwrite: bool) -> None:
    """Write numbers of modules into a configuration; without `overwrite`, those whose keys it does not have."""
    if not promised:
        return
    config = json.loads(file.read_bytes())
    present = {key[-1] for key in _promised(config)}
    changed = False
    for (*path, key), number in promised.items():
        if not overwrite and key in present:
            continue
        inner = config
        for name in path:
            # A text model of a vision-language model's files has a configuration without that part.
            inner = inner.setdefault(name, {}) if overwrite else inner.get(name, inner)
        inner[key], changed = number, True
    if changed:
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _module_names(files: Collection[str], causal: Any) -> tuple[str, ...]:
    own = {name for name, _ in (*causal.named_parameters(), *causal.named_buffers())}
    return tuple(name for name in mtp_names(files) if name not in own)


def _read_tensors(files: Mapping[str, Path], names: Iterable[str]) -> dict[str, Tensor]:
    tensors = {}
    for name in names:
        with safe_open(files[name], framework="pt") as opened:
            tensors[name] = opened.get_tensor(name)
    return tensors


def _write_index(folder: Path, variant: str | None, added: Path | None, metadata: dict[str, str]) -> None:
    """Put a shard behind the files that transformers wrote, and write the index of all.

    Without one to add, an index of an earlier save is removed that transformers left beside the one file it wrote.
    """
    part = "" if variant is None else f".{variant}"
    stem, index = f"model{part}", folder / f"model.safetensors.index{part}.json"
    whole = folder / f"{stem}.safetensors"
    shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if index.exists() else []
    # Where transformers writes one file, it removes all shards, but not their index; and the other way round.
    numbered = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}\.safetensors")
    if all(numbered.fullmatch(name) and (folder / name).exists() for name in shards):
        (whole if shards else index).unlink(missing_ok=True)
    elif whole.exists():
        index.unlink()
        shards = []
    if added is None:
        return
    files = [*(folder / name for name in shards or [whole.name]), added]
    weight_map: dict[str, str] = {}
    size = 0
    for i, path in enumerate(files, start=1):
        name = f"{stem}-{i:05}-of-{len(files):05}.safetensors"
        with safe_open(path, framework="pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), name)
        with path.open("rb") as opened:
            size += path.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")  # without the header
        path.rename(folder / name)
    content = {"metadata": {"total_size": size, **metadata}, "weight_map": weight_map}
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
