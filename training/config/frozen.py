"""Recipe keys of the models that only score: a reference and a critic, given or trained in a stage of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from mtp_ce.training.config.group import Group
from mtp_ce.training.config.loop import OptimizerConfig, StageTrainConfig
from mtp_ce.training.config.model import TrunkConfig

# The recipe's groups of frozen models. Each is a stage of a run whose scorer needs it and whose source is null.
StageName = Literal["reference", "critic"]
ModelKind = Literal["language model", "critic"]


@dataclass(frozen=True)
class FrozenModel:
    """A trained model that a run's scorer reads.

    Attributes:
        role: its name for the scorer.
        key: the recipe key that names it, "reference.source" or an option of the scorer.
        source: a folder, an s3:// address or a hub name; None: the stage named `role` trains it.
        kind: "language model", or "critic" with one value per token.
    """

    role: str
    key: str
    source: str | None
    kind: ModelKind


class FrozenModelConfig(Group):
    """A model that only scores: a trained one, or one that a stage trains."""

    model_kind: ClassVar[ModelKind]

    source: str | None = Field(
        default=None,
        min_length=1,
        description="a trained model: a folder, an s3:// address or a hub name; null: a stage trains it",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="initial weights and the order of the data")
    model: TrunkConfig | None = Field(
        default=None,
        description="its sizes; null: those of the recipe's `model`, and its pretrained weights, if any",
    )
    optimizer: OptimizerConfig | None = Field(default=None, description="null: the recipe's `optimizer`")
    train: StageTrainConfig | None = Field(default=None, description="the loop; required where source is null")

    @model_validator(mode="after")
    def _has_a_source_or_a_loop(self) -> Self:
        if self.source is None and self.train is None:
            raise ValueError("neither source nor train is given; name a trained model, or give train to train one")
        return self


class ReferenceConfig(FrozenModelConfig):
    """The reference of rho1_excess: a next-token model of the text to imitate."""

    model_kind: ClassVar[ModelKind] = "language model"

    documents: Literal["documented", "all"] = Field(
        default="documented",
        description="its training text: public modules with a docstring, or every training file",
    )


class CriticConfig(FrozenModelConfig):
    """The critic of critic_delta: predicts at every token whether the function will compile."""

    model_kind: ClassVar[ModelKind] = "critic"

    @model_validator(mode="after")
    def _counts_steps(self) -> Self:
        if self.train and self.train.max_tokens is not None:
            raise ValueError(
                "train.max_tokens is given, but a critic is trained on pairs of functions; give train.steps"
            )
        return self

    objective: Literal["ranking", "regression"] = Field(
        default="ranking",
        description="ranking: intact above corrupted; regression: the value is the probability to compile",
    )
    corruption: Literal["delete", "swap", "both"] = Field(
        default="both", description="how functions are corrupted: a token deleted, two tokens swapped"
    )
