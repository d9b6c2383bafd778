"""Heads as they lie in a folder beside their model: sought where it is, and put into a wrapper that they fit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from transformers.utils import cached_file

from mtp_ce.heads.residual import CONFIG_FILE, TENSORS_FILE

if TYPE_CHECKING:
    from mtp_ce.hf.wrapper import MTPWrapper

# Of `from_pretrained`, which say where a file is and how it is fetched.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass(frozen=True)
class SavedHeads:
    """What `MTPWrapper.save_pretrained` wrote of the heads."""

    source: str | Path
    tensors: str
    kind: Any
    horizon: int
    hidden_size: int

    @classmethod
    def beside(cls, source: str | Path, **options: Any) -> SavedHeads:
        """Find the heads of a folder or of a name on the hub.

        Args:
            source: where the model is.
            **options: those of the model; what is not for the hub is ignored.

        Raises:
            FileNotFoundError: there are none.
        """
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        found, tensors = (
            cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
            for name in (CONFIG_FILE, TENSORS_FILE)
        )
        if found is None or tensors is None:
            raise FileNotFoundError(
                f"{source} has no {CONFIG_FILE} and {TENSORS_FILE}; MTPWrapper(model, ...) adds heads."
            )
        return cls(source, tensors, **json.loads(Path(found).read_text(encoding="utf-8")))

    def load_into(self, wrapper: MTPWrapper) -> None:
        """Copy the tensors into the parameters of a wrapper's heads.

        Raises:
            ValueError: the heads are not of this wrapper: of another hidden size, kind or number.
        """
        width = wrapper.heads.hidden_size
        if self.hidden_size != width:
            raise ValueError(
                f"{self.source} has heads of hidden size {self.hidden_size} and a model of {width}; they are not of "
                "one wrapper."
            )
        if (self.kind, self.horizon) != (wrapper.kind, wrapper.horizon):
            raise ValueError(
                f"{self.source} has {self.horizon} heads of the kind {self.kind!r}; expected {wrapper.horizon} of the "
                f"kind {wrapper.kind!r}, as the wrapper has."
            )
        saved, wanted = load_file(self.tensors), wrapper.heads.state_dict()
        wrong = [name for name, x in wanted.items() if name not in saved or saved[name].shape != x.shape]
        if wrong := wrong or sorted(saved.keys() - wanted.keys()):
            shapes = (list(part[wrong[0]].shape) if wrong[0] in part else "not there" for part in (saved, wanted))
            raise ValueError(
                f"{self.source} has heads that do not fit its model: {wrong[0]} is {next(shapes)} in {TENSORS_FILE}; "
                f"expected {next(shapes)} for {self.horizon} heads of the kind {self.kind!r}."
            )
        wrapper.heads.load_state_dict(saved)
