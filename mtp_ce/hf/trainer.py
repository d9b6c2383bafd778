"""Hugging Face's trainers for a wrapper: they load what they save of it, and train and evaluate with its loss.

    trainer = MTPTrainer(model=wrapper, args=TrainingArguments(...), ...)     transformers.Trainer

    class MultiTokenSFTTrainer(MTPTrainer, SFTTrainer):                       TRL's, with its processing of data
        pass

A checkpoint has the model's files under the model's own parameter names, and the heads beside them. Trainer loads the
files into the module it trains with strict=False, so that a wrapper would receive no parameter at all. MTPTrainer loads
them into the wrapped model, adapters of PEFT included. Under FSDP and DeepSpeed checkpoints have the wrapper's names,
and Trainer loads them itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer

from mtp_ce.hf.saved_heads import SavedHeads
from mtp_ce.hf.wrapper import MTPWrapper


class MTPTrainer(Trainer):
    """transformers' Trainer for an `MTPWrapper`; as a base class before TRL's SFTTrainer, the same for that one.

    `resume_from_checkpoint` and `load_best_model_at_end` load model, adapters and heads. The loss is the wrapper's in
    training and in evaluation, where TRL would compute that of one head. Predictions are the logits of head 0.

    Args:
        *arguments: as the trainer takes them.
        **options: as the trainer takes them.

    Raises:
        TypeError: the model is no `MTPWrapper`, or it is wrapped in adapters.
        ValueError: `label_smoothing_factor` or `compute_loss_func`, with which no head would be trained.
    """

    model: MTPWrapper

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if not isinstance(self.model, MTPWrapper):
            raise TypeError(
                f"model is {type(self.model).__name__}; expected MTPWrapper, with adapters of PEFT inside: "
                "MTPWrapper(get_peft_model(model, ...), horizon)."
            )
        smoothing = self.args.label_smoothing_factor
        if smoothing:
            raise ValueError(
                f"label_smoothing_factor is {smoothing}; expected 0: Trainer smooths the loss of the model's logits, "
                "and no head would be trained. "
                f"MTPWrapper(label_smoothing={smoothing}) smooths the loss of all heads."
            )
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func is given; expected None: it is called with the model's logits, and no head would be "
                "trained. The wrapper's forward computes the loss; a column token_weights of the data weights it."
            )

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """Return the loss of the wrapper's forward."""
        return Trainer.compute_loss(self, *arguments, **options)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Request logits only where they are used; arguments as Trainer's."""
        inputs = {**inputs, "return_logits": not prediction_loss_only}
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # A tuple where the routers' loss follows the logits.
        return loss, logits[0] if isinstance(logits, tuple) else logits, labels

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = SavedHeads.beside(resume_from_checkpoint)
        if self.model.model is self.model.causal and hasattr(self.model.causal, "peft_config"):
            _load_adapters(self.model.causal, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, self.model.model)
        saved.load_into(self.model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _load_adapters(causal: Any, checkpoint: Path) -> None:
    """Load the adapters of a checkpoint into a model that transformers inserted them into, without PEFT's wrapper."""
    prefix = "base_model.model."
    saved = {name.removeprefix(prefix): x for name, x in load_file(checkpoint / "adapter_model.safetensors").items()}
    current = causal.get_adapter_state_dict()
    for name in sorted(saved.keys() | current.keys()):
        if name not in saved or name not in current or saved[name].shape != current[name].shape:
            raise ValueError(f"{checkpoint} has an adapter that does not fit the model's at {name}.")
        current[name].copy_(saved[name])
