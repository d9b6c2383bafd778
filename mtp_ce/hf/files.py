"""The files of a wrapper: the model under its own names, which loads without the heads, and the heads beside it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from mtp_ce.heads.protocol import Heads, check_materialized
from mtp_ce.hf.causal import causal_model
from mtp_ce.hf.checkpoint import load_model, parameters_beside_adapters
from mtp_ce.hf.saved_heads import HUB_OPTIONS, SavedHeads
from mtp_ce.serving.carried import CarriedModule

TrunkMode = Literal["joint", "detached", "frozen"]
LossPath = Literal["linear", "logits"]
Targets = Literal["text", "trunk"]


class WrapperFiles(PreTrainedModel):
    """Saving and loading of `MTPWrapper`, its subclass."""

    model: Any
    heads: Heads
    trunk: TrunkMode
    carried: CarriedModule

    @property
    def causal(self) -> Any:
        """The causal language model itself, without the wrapper of PEFT."""
        return causal_model(self.model)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write the model, which loads without the heads, and the heads beside it.

        Tensors of an MTP module that transformers did not load are carried over from the files that the model came
        from. Where `trunk` is "joint", the index of the files says that they are stale.

        Args:
            save_directory: folder for both.
            is_main_process: whether this process writes; others take part in gathering the model.
            state_dict: of the wrapper, where it was gathered from elsewhere; None takes the wrapper's own. An empty one
                writes no heads.
            **options: for the model's `save_pretrained`.

        Raises:
            FileNotFoundError: the files of an MTP module that is to be carried over can't be found any more.
            ValueError: `push_to_hub`, which is a separate method of the wrapper; parameters on the meta device; or an
                MTP module that can't be carried over: with `distributed_checkpoint`, or behind another number of
                layers than the model has.
        """
        if options.get("push_to_hub"):
            raise ValueError(
                "push_to_hub is True; expected False: the model would be on the hub before its heads are written. "
                "The wrapper's push_to_hub(repo_id) uploads both."
            )
        if state_dict is None:
            check_materialized(self)
        split: dict[str, dict[str, Tensor] | None] = {"model.": None, "heads.": None}
        if state_dict is not None:
            split = {
                prefix: {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
                for prefix in split
            }
        if left_out := parameters_beside_adapters(self.model):
            warnings.warn(f"{save_directory} is written without all that is trained: {left_out}", stacklevel=2)
        # DeepSpeed passes an empty one where it keeps the parameters in files of its own.
        writes = is_main_process and state_dict != {}
        # Adapters are saved without the model, and name its files.
        adapted = hasattr(self.model, "peft_config")
        trained: dict[str, Tensor] = {}
        if writes and not adapted:
            trained = self.heads.module_tensors(self.causal, split["heads."], split["model."])
        with self._with_module(save_directory, is_main_process and not adapted, state_dict != {}, trained, options):
            self.model.save_pretrained(
                save_directory, is_main_process=is_main_process, state_dict=split["model."], **options
            )
        if writes:
            self.heads.save_pretrained(save_directory, state_dict=split["heads."], in_model=bool(trained))

    def _with_module(
        self, folder: str | Path, writes: bool, tensors: bool, trained: dict[str, Tensor], options: dict[str, Any]
    ) -> AbstractContextManager[None]:
        if not writes:
            return nullcontext()
        if options.get("distributed_checkpoint") and (self.carried.names or trained):
            raise ValueError(
                f"distributed_checkpoint is True, and {self.carried.source} has an MTP module that is written into "
                "safetensors; expected False."
            )
        return self.carried.carried_into(
            self.causal, folder, stale=self.trunk == "joint", trained=trained, variant=options.get("variant"),
            tensors=tensors,
        )  # fmt: skip

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | Path,
        *,
        heads: str | None = None,
        horizon: int | None = None,
        trunk: TrunkMode = "joint",
        loss: LossPath = "linear",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        head_reduction: str = "target",
        head_weights: Sequence[float] | Tensor | None = None,
        targets: Targets = "text",
        activation_checkpointing: bool = False,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Load what `save_pretrained` wrote, or a checkpoint with MTP modules of its own.

        Adapters of PEFT are trained further where `trunk` is "joint".

        Args:
            source: the folder, or a name on the hub.
            heads: None loads the heads that are saved beside the model. "native" makes heads of the MTP modules among
                the model's own files, which need no others.
            horizon: with heads="native": H; None means one more than there are modules, or that of the saved heads.
            trunk: see `MTPWrapper`; like all that follow it is not saved.
            loss: "linear" or "logits".
            label_smoothing: of the loss.
            z_loss: of the loss.
            head_reduction: of the loss.
            head_weights: of the loss.
            targets: "text" or "trunk".
            activation_checkpointing: of the heads.
            trust_remote_code: run Python code from the model's files, if its class is not one of transformers. Read
                that code first.
            **options: for `from_pretrained` of the class that the model's configuration names. Those that locate files
                apply to the heads' too.

        Raises:
            FileNotFoundError: there are no heads beside the model.
            ValueError: the heads do not fit the model: another hidden size, kind or number; or their class is the
                author's own and `source` is no local folder; or a parameter of the model is missing or is not its own;
                or the model needs code that may not run; or, with heads="native", as `MTPWrapper`.
        """
        if heads not in (None, "native") or (heads is None and horizon is not None):
            raise ValueError(
                f"heads is {heads!r} and horizon is {horizon}; expected heads='native' with any horizon, or neither: "
                "MTPWrapper(model, horizon, heads=...) makes new heads on a model that is loaded."
            )
        saved = SavedHeads.beside(source, **options) if heads is None else SavedHeads.native(source, **options)
        if saved is not None:
            saved.check_trusted()
        model = load_model(source, trainable=trunk == "joint", trust_remote_code=trust_remote_code, **options)
        construct: Any = cls  # MTPWrapper
        arguments = {
            "trunk": trunk, "loss": loss, "label_smoothing": label_smoothing, "z_loss": z_loss,
            "head_reduction": head_reduction, "head_weights": head_weights, "targets": targets,
            "activation_checkpointing": activation_checkpointing,
        }  # fmt: skip
        if saved is None:
            wrapper: Self = construct(model, horizon, heads=heads, **arguments)
            return wrapper
        return cls._with(saved if horizon is None else replace(saved, horizon=horizon), model, **arguments)

    @classmethod
    def with_saved_heads(cls, model: nn.Module, source: str | Path, **options: Any) -> Self:
        """Put heads that are saved on a model that is loaded.

        Args:
            model: as `MTPWrapper` takes it; the heads take its dtype and device.
            source: the folder of `save_pretrained`, or of the heads' two files alone, or a name on the hub.
            **options: `trunk`, `loss` and the options of the loss, as `MTPWrapper` takes them, and those of
                `from_pretrained` that locate files.

        Raises:
            FileNotFoundError, ValueError: as `from_pretrained`.
        """
        hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        saved = SavedHeads.beside(source, **hub)
        saved.check_trusted()
        return cls._with(saved, model, **options)

    @classmethod
    def _with(cls, saved: SavedHeads, model: nn.Module, **options: Any) -> Self:
        construct: Any = cls  # MTPWrapper
        wrapper = construct(model, saved.horizon, heads=saved.kind, shared=saved.shared, **options)
        if not (saved.in_model and wrapper.heads.stored_in == saved.tensors):  # which are read already
            saved.load_into(wrapper)
        return wrapper

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load parameters by the wrapper's own names, as its `state_dict` has them; arguments as `torch.nn.Module`'s.

        Raises:
            ValueError: none of the wrapper's names is there, as in the files of a saved model.
        """
        names = {name for name, _ in (*self.named_parameters(remove_duplicate=False), *self.named_buffers())}
        if state_dict and names.isdisjoint(state_dict):
            raise ValueError(
                f"state_dict has none of the wrapper's own names, such as {min(names)!r}; it begins with "
                f"{min(state_dict)!r}. If it comes from a folder of save_pretrained, MTPWrapper.from_pretrained loads "
                "model and heads, and mtp_ce.MTPTrainer resumes in place of transformers.Trainer."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
