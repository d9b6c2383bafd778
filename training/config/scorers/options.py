"""What a scorer of the trainer declares: its options, the frozen models it needs, the bounds of its weights.

A scorer is one file with a subclass of `ScorerConfig`. Its fields are the options of the recipe's `scorer` group; its
methods tell the run what to train, fetch and count; `build` returns the object that weighs batches. The recipe is
checked before torch is imported, so a scorer of the package imports torch inside `build`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from mtp_ce.training.config.frozen import StageName
from mtp_ce.training.config.group import Group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mtp_ce.scorers.weights import Scorer


class ScorerConfig(Group):
    """Options of a scorer. A subclass overrides what differs from a scorer that needs no model.

    Attributes:
        stages: frozen models that it needs, by the recipe groups that name or train them: "reference", "critic".
        weighted: whether tokens get different weights; only then can weights be compared, precomputed and shown.
        units: unit of each number per token that the built scorer's `explain` returns, for the weights page.

    Example:
        class Rare(ScorerConfig):
            power: float = Field(default=0.5, ge=0, description="exponent of the inverse frequency")

            def build(self, models, seed):
                return RareScorer(self.power)
    """

    stages: ClassVar[tuple[StageName, ...]] = ()
    weighted: ClassVar[bool] = True
    units: ClassVar[Mapping[str, str]] = {}

    name: str = Field(description="the scorer that computes the token weights")

    def build(self, models: Mapping[str, Any], seed: int) -> Scorer:
        """Build the scorer.

        Args:
            models: the frozen models on their device, by role: those of `stages` and of `sources`.
            seed: the recipe's.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")

    def sources(self) -> dict[str, str]:
        """Return the frozen language models that its own options name: option -> folder, address or hub name.

        The model of an option `current` takes the place of the model in training.
        """
        return {}

    @property
    def reads_current(self) -> bool:
        """Whether it reads the model in training: its next-token losses, or the drafts of its heads."""
        return False

    @property
    def reads_drafts(self) -> bool:
        """Whether it needs heads that draft; such a scorer reads the model in training."""
        return False

    @property
    def reads_noise(self) -> bool:
        """Whether `run` gets `noise` [B, S] bool, the truth about noise that `data.noise` plants."""
        return False

    @property
    def depends_on_batch(self) -> bool:
        """Whether the weights of a row depend on the other rows of the forward, on this rank or on all."""
        return False

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest weight of a supervised token; a step with a weight outside of them is refused."""
        return 0.0, math.inf

    @property
    def scored_by(self) -> ScorerConfig:
        """The scorer that computes the scores: itself, or the one whose weights a control permutes."""
        return self

    @property
    def label(self) -> str:
        """Name for folders and tables: of a class path the class."""
        return self.name.rpartition(":")[2]

    def flops_per_token(self, vocab_size: int, hidden_size: int, horizon: int) -> int:
        """Return the FLOPs of one token's score beside the forwards of the frozen models, for --dry-run."""
        # The rows of the model in training start from hidden states that exist already.
        heads = horizon if self.reads_drafts else int(self.reads_current)
        return 2 * vocab_size * hidden_size * heads

    def on_one_rank(self) -> Self:
        """Return the options that weigh the batch of a single rank without the others."""
        return self

    def among(self, group: ProcessGroup | None) -> Self:
        """Return the options that weigh the batch of these ranks together; None means all ranks."""
        return self


class NormalizationOptions(Group):
    """Options of `normalize_weights`, which turns scores into weights of mean 1."""

    mode: Literal["softmax", "topk"] = Field(
        default="softmax",
        description="softmax: soft weights; topk: the highest scores share all weight, arXiv:2404.07965",
    )
    temperature: float = Field(default=0.7, gt=0, description="temperature of softmax, in standard deviations")
    eps: float = Field(default=0.05, ge=0, le=1, description="smallest weight of softmax")
    w_max: float = Field(default=3.0, ge=1, description="largest weight of softmax")
    top_fraction: float = Field(default=0.6, gt=0, le=1, description="fraction of the tokens that topk keeps")
    scope: Literal["sequence", "batch", "global"] = Field(
        default="sequence",
        description="tokens over which the mean is 1: a document in its row, the rows of a forward, those of all ranks",
    )
    _group: Any = PrivateAttr(None)  # the ranks of "global"

    def normalization(self) -> dict[str, Any]:
        """Return the options as arguments of `normalize_weights`."""
        return self.model_dump(include=set(NormalizationOptions.model_fields)) | {"group": self._group}


class ScoreConfig(ScorerConfig, NormalizationOptions):
    """Options of a scorer whose scores become weights by `normalize_weights`."""

    @property
    def depends_on_batch(self) -> bool:
        """Whether the mean is taken over more than a document."""
        return self.scope != "sequence"

    @property
    def bounds(self) -> tuple[float, float]:
        """Bounds of softmax, eps and w_max, or of topk."""
        return (self.eps, self.w_max) if self.mode == "softmax" else (0.0, math.inf)

    def on_one_rank(self) -> Self:
        """Return the options with scope "batch" in place of "global"."""
        return self.model_copy(update={"scope": "batch"}) if self.scope == "global" else self

    def among(self, group: ProcessGroup | None) -> Self:
        """Return the options with scope "global" over these ranks."""
        copy = self.model_copy()
        copy._group = group
        return copy
