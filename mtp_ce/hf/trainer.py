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

from torch import Tensor, nn
from transformers import Trainer

from mtp_ce.hf.checkpoint import checkpoint_to_resume, load_into
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

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """Train; arguments as Trainer's.

        Args:
            resume_from_checkpoint: a complete checkpoint, or True for the newest complete one in output_dir: one that
                was being written when its process was killed is passed over with a warning.
            *arguments: as Trainer takes them.
            **options: as Trainer takes them.

        Raises:
            ValueError: the checkpoint is not complete, or does not fit the wrapper.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir, sharded=sharded)
        return super().train(checkpoint, *arguments, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = SavedHeads.beside(resume_from_checkpoint)
        load_into(self.model.model, Path(resume_from_checkpoint))
        saved.load_into(self.model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)
