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

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from mtp_ce.hf.arguments import LossArguments
from mtp_ce.hf.checkpoint import checkpoint_to_resume, load_into
from mtp_ce.hf.head_metrics import HeadMeans
from mtp_ce.hf.heads_lr import separate_heads
from mtp_ce.hf.output import MTPOutput
from mtp_ce.hf.row_count import CountingCollator, own_labels
from mtp_ce.hf.saved_heads import SavedHeads
from mtp_ce.hf.trainer_arguments import (
    check_arguments,
    check_bases,
    check_options,
    check_parallelism,
    use_router_coefficient,
)
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.ops.rows import count_terms
from mtp_ce.options import LossInputs, LossOptions


class MTPTrainer(Trainer):
    """transformers' Trainer for an `MTPWrapper`; as a base class before TRL's SFTTrainer, the same for that one.

    `resume_from_checkpoint` and `load_best_model_at_end` load model, adapters and heads. The loss is the wrapper's in
    training and in evaluation, where TRL would compute that of one head; `eval_loss` is a mean over tokens, whatever
    the batches. Logs have what `mtp_ce.hf.head_metrics` lists, and with SFTTrainer its own metrics. Predictions are the
    logits of head 0. The rows of a batch that are not masked are counted when it is collated, and the batch has their
    number as `drop_dead_rows`: whoever replaces labels or weights after that, in a subclass, removes it.

    Args:
        *arguments: as the trainer takes them.
        heads_lr: learning rate of the heads' parameter groups; None means that of all parameters. The scheduler scales
            both alike.
        **options: as the trainer takes them.

    Raises:
        TypeError: the model is no `MTPWrapper`, or it is wrapped in adapters.
        ValueError: an option with which no head would be trained or the loss would be another, such as
            `label_smoothing_factor`, `compute_loss_func`, `use_liger_kernel` and `loss_type="dft"`.
    """

    model: MTPWrapper
    # The wrapper refuses the tags of TRL's trainers that would compute a loss of their own.
    _tag_names: ClassVar[list[str]] = ["mtp_ce", "trl", "sft"]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_bases(cls, MTPTrainer)

    def __init__(self, *arguments: Any, heads_lr: float | None = None, **options: Any) -> None:
        check_options(super().__init__, arguments, options, heads_lr)
        super().__init__(*arguments, **options)
        if not isinstance(self.model, MTPWrapper):
            raise TypeError(
                f"model is {type(self.model).__name__}; expected MTPWrapper, with adapters of PEFT inside: "
                "MTPWrapper(get_peft_model(model, ...), horizon)."
            )
        check_arguments(self.args, self.compute_loss_func)  # those that another base's constructor has named itself
        check_parallelism(self.accelerator.parallelism_config, self.args.n_gpu)
        heads = self.model.heads
        if heads_lr is not None and next(heads.parameters(), None) is None:
            raise ValueError(
                f"heads_lr is {heads_lr} with heads={heads.kind!r}, which have no parameters; expected None."
            )
        self.heads_lr = heads_lr
        self._trained, self._evaluated = (HeadMeans(heads.horizon, heads.drafts) for _ in range(2))
        # TRL's trainer counts tokens; its metrics are computed here, where the loss is.
        self._has_token_metrics = hasattr(self, "_total_train_tokens")
        self._tokens: Tensor | int = 0  # since the last log, of this rank
        if self._has_token_metrics:
            use_router_coefficient(self.args, self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with parameter groups of their own for the heads where `heads_lr` is given."""
        new = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if new and self.heads_lr is not None:
            wrapper = self.accelerator.unwrap_model(self.model if model is None else model)
            separate_heads(optimizer, wrapper.heads, self.heads_lr)
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Return Trainer's, whose batches have `drop_dead_rows`."""
        return self._counting(super().get_train_dataloader())

    def get_eval_dataloader(self, *arguments: Any, **options: Any) -> DataLoader:
        """Return Trainer's, whose batches have `drop_dead_rows`; arguments as its."""
        return self._counting(super().get_eval_dataloader(*arguments, **options))

    def get_test_dataloader(self, *arguments: Any, **options: Any) -> DataLoader:
        """Return Trainer's, whose batches have `drop_dead_rows`; arguments as its."""
        return self._counting(super().get_test_dataloader(*arguments, **options))

    def _counting(self, loader: DataLoader) -> DataLoader:
        """Have a data loader count rows when it collates: after that, batches are on the device."""
        # accelerate's DataLoaderDispatcher concatenates the batches of all ranks, of tensors alone, and cuts them.
        if type(loader).__name__ == "DataLoaderShard" and self.model.loss == "linear":
            inner: Any = loader.base_dataloader  # type: ignore[attr-defined]
            if not isinstance(inner.collate_fn, CountingCollator):  # persistent workers keep their loader
                inner.collate_fn = CountingCollator(inner.collate_fn, self.model.row_count)
        return loader

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Count the tokens that are predicted from the positions of these batches: those of halos are others'."""
        count: Tensor | int | None = super()._get_num_items_in_batch(list(map(own_labels, batch_samples)), device)
        return count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the wrapper's forward; arguments as Trainer's."""
        shifted = "shift_labels" in inputs
        labels = inputs.get("shift_labels" if shifted else "labels")
        if labels is None:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        requests = {"return_dict": True, "return_stats": True, "return_entropy": self._has_token_metrics}
        loss, outputs = Trainer.compute_loss(self, model, {**inputs, **requests}, True, num_items_in_batch)
        sums = self._trained if self.model.training else self._evaluated
        sums.add_heads(outputs["stats"], outputs.get("aux_loss"))
        if self._has_token_metrics:
            S = outputs["stats"].ce.shape[1]
            first = inputs.get("left_halo", 0) + int(not shifted)
            next_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, first : first + S]
            sums.add_tokens(outputs["stats"], next_labels, outputs["entropy"])
            if self.model.training:
                mask = inputs.get("attention_mask")
                self._tokens += next_labels.numel() if mask is None else mask.sum()
        if not self.model.training:
            own = count_terms(outputs["stats"].live, *self._loss_of(inputs))
            self._add_eval_loss(loss, own, num_items_in_batch)
        # Without what only logs read.
        kept = {name: value for name, value in outputs.items() if name not in ("stats", "entropy")}
        return (loss, MTPOutput(**kept)) if return_outputs else loss

    def _loss_of(self, inputs: dict[str, Any]) -> tuple[LossOptions, LossInputs]:
        """Return the options and tensors of a batch's loss that decide which tokens are predicted."""
        arguments = dict(inputs)
        call = LossArguments.take(arguments.pop("labels", None), arguments)
        assert call.targets is not None
        options = replace(self.model.loss_options, shift=call.shift, **call.options)
        seq_lens, document_ids = call.tensors.get("seq_lens"), arguments.get("document_ids")
        return options, LossInputs(call.targets, seq_lens=seq_lens, document_ids=document_ids)

    def _add_eval_loss(self, loss: Tensor, own: Tensor, num_items: Tensor | int | None) -> None:
        """Add a loss that is divided by `num_items`, or without by the loss's own count [] of its terms."""
        items, ranks = own if num_items is None else torch.as_tensor(num_items, device=loss.device), 1
        if num_items is not None and self.args.average_tokens_across_devices:
            # The count is of all ranks, and Trainer has multiplied the loss by as many.
            ranks = self.accelerator.num_processes // self.get_tp_size()
        self._evaluated.add_loss(loss, items / ranks, finite_only=self.args.logging_nan_inf_filter)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, with a loss that is a mean over tokens where Trainer's is one over batches; arguments as its."""
        self._evaluated.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._evaluated.take(self.args.device, self._sum_ranks)
        if self._has_token_metrics:
            means["num_tokens"] = self._count_tokens()
        metrics: dict[str, float] = output.metrics or {}
        metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output._replace(metrics=metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the heads' means since the last log of the training; arguments as Trainer's."""
        if "loss" in logs or "train_loss" in logs:
            means = self._trained.take(self.args.device, self._sum_ranks)
            if self._has_token_metrics and (means or "loss" in logs):
                means["num_tokens"] = self._count_tokens()
            logs.update(means)
        super().log(logs, start_time)

    def _sum_ranks(self, sums: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(sums, reduction="sum")
        return reduced

    def _count_tokens(self) -> int:
        """Add the tokens since the last call to TRL's count, and return it."""
        tokens = self._sum_ranks(torch.as_tensor(self._tokens, device=self.args.device))
        self._total_train_tokens: int = self._total_train_tokens + int(tokens) // self.get_tp_size()
        self._tokens = 0
        return self._total_train_tokens

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Request logits only where they are used; arguments as Trainer's."""
        inputs = {**self._without_repeats(inputs), "return_logits": not prediction_loss_only}
        loss, logits, labels = Trainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)
        # A tuple where the routers' loss follows the logits.
        return loss, logits[0] if isinstance(logits, tuple) else logits, labels

    def _without_repeats(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Mask the labels of rows that repeat others, with which the last batch gives every rank the same number."""
        name = "shift_labels" if "shift_labels" in inputs else "labels"
        state, labels = self.accelerator.gradient_state, inputs.get(name)
        if labels is None or self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder < 1:
            return inputs
        # A row of several, flattened for flash attention, may hold some that repeat: those stay.
        size = self.args.eval_batch_size if "cu_seq_lens_q" in inputs else len(labels)
        row = torch.arange(len(labels), device=labels.device) + self.accelerator.process_index * size
        return {**inputs, name: torch.where((row < state.remainder)[:, None], labels, -100)}

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
        if not sharded and self.model_wrapped is self.model:
            # accelerate returns a model that `evaluate` has prepared as it is, and every rank would train by itself.
            vars(self.model).pop("_is_accelerate_prepared", None)
        return super().train(checkpoint, *arguments, **options)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise ValueError(
                f"{checkpoint} has an optimizer of other parameter groups ({error}); heads_lr is {self.heads_lr}; "
                "expected it as in the run that wrote the checkpoint."
            ) from None

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
