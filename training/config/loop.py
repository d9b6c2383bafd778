"""Recipe keys of the training loop: optimizer, steps, device and checkpoints."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mtp_ce.training.config.group import Group


class OptimizerConfig(Group):
    """AdamW with a linear warm-up and a cosine decay; both learning rates follow the same schedule."""

    lr: float = Field(gt=0, description="peak learning rate")
    heads_lr: float | None = Field(
        default=None, gt=0, description="peak learning rate of the extra heads, which start untrained; null: lr"
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="steps over which the learning rate rises from 0, at the first step, to lr"
    )
    final_lr_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="end of the cosine, which the step after the last one would have, as a fraction of lr",
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients, per step")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the mean of squared gradients, per step")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the mean of squared gradients")
    weight_decay: float = Field(
        default=0.1,
        ge=0,
        description="decoupled weight decay; matrices only, not embeddings, norms or biases",
    )
    clip_norm: float | None = Field(
        default=1.0,
        gt=0,
        description="maximum L2 norm of the whole gradient; null logs the norm and does not clip",
    )


class StageTrainConfig(Group):
    """The training loop of a stage."""

    steps: int = Field(ge=1, description="optimizer steps; null where max_tokens is given")
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="token budget in place of steps: batch_size rows of sequence_length per step, padding included; "
        "the last step may exceed it",
    )
    batch_size: int = Field(ge=1, description="rows per optimizer step; for a critic, pairs of functions")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="rows per forward; divides batch_size; null: all. Changes memory, not results, unless the weights "
        "of a row depend on other rows: scope batch or global, or random_matched",
    )
    log_every: int = Field(default=10, ge=1, description="steps between two lines of metrics")

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self


class TrainConfig(StageTrainConfig):
    """The training loop of the main stage, and the device of all stages."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="of forward and backward, and of a scorer's frozen models, whose scores are coarser in bf16; "
        "parameters, accumulated gradients and optimizer state stay fp32",
    )
    activation_checkpointing: bool = Field(
        default=False, description="whether layers recompute their activations in the backward. Changes memory only"
    )
    cpu_offload: bool = Field(
        default=False, description="whether parameters and optimizer state stay in host memory. Changes memory only"
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="number of ranks that share every layer and the vocabulary, and have the same rows; divides the "
        "number of ranks. Changes memory, not results",
    )


class CheckpointConfig(Group):
    """The saved state of the loop, from which --resume continues as if the run had never stopped."""

    every: int | None = Field(
        default=200,
        ge=1,
        description="steps between two checkpoints, and one after the last step; null: only when the run is stopped",
    )
    keep: int = Field(default=2, ge=1, description="number of newest checkpoints to keep; older ones are deleted")
    upload: str | None = Field(
        default=None,
        pattern=r"^s3://[^/]+/.+",
        description="s3://bucket/prefix that checkpoints and the trained model are copied to, under the name of the "
        "run directory",
    )
