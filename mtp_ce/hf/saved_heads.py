"""Heads in the files beside their model: located, checked against a wrapper, and loaded into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers.utils import cached_file

from mtp_ce.heads.kinds import CONFIG_FILE, KINDS, TENSORS_FILE
from mtp_ce.heads.protocol import ModelWithHeads, check_materialized
from mtp_ce.heads.saved import check_format, check_tensors, read_config
from mtp_ce.serving.carried import CarriedModule

# Options of `from_pretrained` that locate a file and control its download.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass(frozen=True)
class SavedHeads:
    """The heads' files of `MTPWrapper.save_pretrained`.

    Attributes:
        source: where the model is.
        tensors: the file of the tensors, or the folder of the model's files that they are among.
        kind: as all that follow, see `mtp_ce.heads.saved.SavedConfig`.
    """

    source: str | Path
    tensors: str
    kind: str
    horizon: int
    hidden_size: int
    format: int = 1
    shared: bool = False
    in_model: bool = False

    @classmethod
    def beside(cls, source: str | Path, **options: Any) -> SavedHeads:
        """Locate the heads in a folder or under a name on the hub.

        Args:
            source: where the model is.
            **options: those of the model; options that do not concern the hub are ignored.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they are damaged, or the two files do not fit each other.
        """
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        config, tensors = (
            cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
            for name in (CONFIG_FILE, TENSORS_FILE)
        )
        if config is not None and (saved := read_config(Path(config))).in_model:
            return cls(source, str(Path(config).parent.absolute()), **saved._asdict())
        if config is None or tensors is None:
            raise FileNotFoundError(
                f"{source} has no {CONFIG_FILE} and {TENSORS_FILE}; MTPWrapper(model, ...) adds heads."
            )
        check_tensors(Path(tensors), saved)
        return cls(source, tensors, **saved._asdict())

    @classmethod
    def native(cls, source: str | Path, **options: Any) -> SavedHeads | None:
        """Locate saved MTP modules beside a model or its adapters; None where none were saved by a wrapper.

        Args:
            source: where the model is.
            options: as of `beside`.
        """
        try:
            saved = cls.beside(source, **options)
        except FileNotFoundError:
            return None
        return saved if saved.kind == "native" else None

    def check_trusted(self) -> None:
        """Check that heads of a class from outside the package come from a local folder: loading imports the class.

        Raises:
            ValueError: they come from the hub.
        """
        if self.kind not in KINDS and not Path(self.source).is_dir():
            raise ValueError(
                f"{self.source} has heads of the class {self.kind!r}, which is not part of mtp_ce; expected a local "
                "folder, because loading them imports the class: download the files and pass their folder."
            )

    def load_into(self, wrapper: ModelWithHeads) -> None:
        """Copy the tensors into the parameters of a wrapper's heads.

        Raises:
            ValueError: the heads do not fit the wrapper: another hidden size, kind or number; or they are on the meta
                device.
        """
        heads = wrapper.heads
        check_materialized(heads)
        if self.hidden_size != heads.hidden_size:
            raise ValueError(
                f"{self.source} has heads of hidden size {self.hidden_size} and a model of {heads.hidden_size}; they "
                "are not of one wrapper."
            )
        shared = heads.shared and heads.can_share
        if (self.kind, self.horizon, self.shared) != (heads.kind, heads.horizon, shared):
            raise ValueError(
                f"{self.source} has {self.horizon} heads of the kind {self.kind!r}{_shared(self)}; expected "
                f"{heads.horizon} of the kind {heads.kind!r}{_shared(heads)}, as the wrapper has."
            )
        # Of a class of your own; those of the package are checked when the file is read.
        check_format(self.source, self.kind, self.format, heads.format)
        if self.in_model:
            heads.load_stored(wrapper.causal, CarriedModule.at(self.tensors, wrapper.causal))
            return
        saved, wanted = load_file(self.tensors), heads.state_dict()
        wrong = [name for name, x in wanted.items() if name not in saved or saved[name].shape != x.shape]
        if wrong := wrong or sorted(saved.keys() - wanted.keys()):
            shapes = (list(side[wrong[0]].shape) if wrong[0] in side else "missing" for side in (saved, wanted))
            raise ValueError(
                f"{self.source} has heads that do not fit its model: {wrong[0]} is {next(shapes)} in {TENSORS_FILE}; "
                f"expected {next(shapes)} for {self.horizon} heads of the kind {self.kind!r}."
            )
        heads.load_state_dict(saved)


def _shared(heads: Any) -> str:
    return " in one shared module" if heads.shared else ""
