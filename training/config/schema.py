"""A whole recipe: its groups, and the checks of keys against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mtp_ce.heads.kinds import KINDS, may_be_shared, may_draft
from mtp_ce.registry import load_class
from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.config.frozen import CriticConfig, FrozenModel, FrozenModelConfig, ReferenceConfig, StageName
from mtp_ce.training.config.group import Group
from mtp_ce.training.config.loop import CheckpointConfig, OptimizerConfig, TrainConfig
from mtp_ce.training.config.model import ModelConfig, PretrainedModelConfig
from mtp_ce.training.config.scorers.options import ScoreConfig, ScorerConfig
from mtp_ce.training.config.scorers.table import CONTROLS, SCORERS, AnyScorer
from mtp_ce.training.config.scorers.uniform import UniformScorerConfig
from mtp_ce.training.config.tracking import TrackingConfig
from mtp_ce.training.config.validation import ValidationConfig
from mtp_ce.training.errors import RecipeError


class EvaluationRecipe(Group):
    """What `eval-mtp` evaluates a checkpoint on; the recipe of a run has the same groups."""

    data: DataConfig = Field(
        default_factory=DataConfig, description="the text and its split; the tokenizer is the checkpoint's"
    )
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="scoring of the held-out files")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one")

    @model_validator(mode="after")
    def _tokenizer_is_the_checkpoints(self) -> Self:
        for name in ("tokenizer", "vocab_size"):
            if (value := getattr(self.data, name)) is not None:
                raise ValueError(
                    f"data.{name} is {value}, but a checkpoint has its own tokenizer and vocabulary; give "
                    f"data.{name}=null"
                )
        return self


def _with_steps(name: str, train: Any, length: Any) -> Any:
    """Return the loop with the steps of its max_tokens; pydantic reports a loop that is not valid."""
    if not isinstance(train, dict):
        return train
    budget, rows, steps = train.get("max_tokens"), train.get("batch_size"), train.get("steps")
    if not all(type(number) is int and number > 0 for number in (budget, rows, length)):
        return train
    assert budget is not None
    # A printed recipe has both, and they agree.
    needed = -(-budget // (rows * length))
    if steps not in (None, needed):
        raise ValueError(
            f"{name}.max_tokens {budget} is {needed} steps of {rows} x {length} tokens, and {name}.steps is {steps}; "
            f"give one of them, and {name}.steps=null or {name}.max_tokens=null"
        )
    return train | {"steps": needed}


class Recipe(Group):
    """Everything that determines a run: its stages (reference, critic, main) and what they share."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="prefix of the name of the run directory and of the MLflow run",
    )
    description: str = Field(default="", description="one sentence, shown by --dry-run")
    seed: int = Field(default=0, ge=0, lt=2**63, description="initial weights and the order of the rows")
    data: DataConfig = Field(default_factory=DataConfig, description="the text, its split and its tokens")
    model: ModelConfig = Field(description="the trunk and its heads")
    scorer: AnyScorer = Field(
        default_factory=UniformScorerConfig,
        description="the scorer and its options; a scorer of your own is named package.module:Class",
    )
    precompute_weights: bool = Field(
        default=False, description="whether a stage computes the weight of every token once, before training"
    )
    reference: ReferenceConfig | None = Field(
        default=None, description="the reference model of a scorer that needs one"
    )
    critic: CriticConfig | None = Field(default=None, description="the critic of a scorer that needs one")
    optimizer: OptimizerConfig = Field(description="AdamW, learning rate, clipping")
    train: TrainConfig = Field(description="the loop")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="scoring of the held-out files")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="saved state, from which a stopped run is resumed"
    )
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow")

    @model_validator(mode="before")
    @classmethod
    def _tokens_become_steps(cls, tree: Any) -> Any:
        """Convert token budgets to steps."""
        if not isinstance(tree, dict):
            return tree
        data, reference = tree.get("data", {}), tree.get("reference")
        default = DataConfig.model_fields["sequence_length"].default
        length = data.get("sequence_length", default) if isinstance(data, dict) else None
        tree = tree | {"train": _with_steps("train", tree.get("train"), length)}
        if isinstance(reference, dict) and "train" in reference:
            tree["reference"] = reference | {"train": _with_steps("reference.train", reference["train"], length)}
        return tree

    @model_validator(mode="after")
    def _vocabulary_is_known(self) -> Self:
        pretrained = isinstance(self.model, PretrainedModelConfig)
        if pretrained and self.data.vocab_size is not None:
            raise ValueError(
                f"data.vocab_size is {self.data.vocab_size}, but a pretrained model has its own vocabulary; "
                "give data.vocab_size=null"
            )
        if not pretrained and self.data.vocab_size is None:
            raise ValueError("data.vocab_size is null, but model.kind llama needs it; give data.vocab_size=8192")
        return self

    @model_validator(mode="after")
    def _groups_agree(self) -> Self:
        if self.model.mtp.horizon >= self.data.sequence_length:
            raise ValueError(
                f"model.mtp.horizon {self.model.mtp.horizon} leaves no target for the last head in rows of "
                f"data.sequence_length {self.data.sequence_length}; make the rows longer than the horizon"
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is not below train.steps "
                f"{self.train.steps}; the learning rate would never decay"
            )
        for name, stage in (("reference", self.reference), ("critic", self.critic)):
            if stage and stage.train and (stage.optimizer or self.optimizer).warmup_steps >= stage.train.steps:
                raise ValueError(
                    f"{name}.train.steps {stage.train.steps} is not above its warmup_steps "
                    f"{(stage.optimizer or self.optimizer).warmup_steps}; give {name}.optimizer or more steps"
                )
        return self

    @model_validator(mode="after")
    def _heads_draft_so_far(self) -> Self:
        drafted, heads = self.validation.decoding.draft_tokens, self.model.mtp
        # How far a module of the checkpoint or a class of the user's own drafts is known when it is loaded.
        known = heads.kind in KINDS and not KINDS[heads.kind].in_model
        one_module = heads.shared or (may_be_shared(heads.kind) and heads.horizon == 2)
        if drafted is not None and drafted >= heads.horizon and known and not one_module:
            raise ValueError(
                f"validation.decoding.draft_tokens {drafted} is more than the {heads.horizon - 1} extra heads of "
                f"model.mtp.horizon {heads.horizon}; give validation.decoding.draft_tokens=null"
            )
        return self

    @model_validator(mode="after")
    def _scorer_has_its_models(self) -> Self:
        for stage in self.scorer.scored_by.stages:
            if self.stage(stage) is None:
                raise ValueError(
                    f"scorer {self.scorer.name} needs a {stage} and there is none; give {stage}.source=FOLDER, an "
                    f"s3:// address or a hub name, or {stage}.train.steps and {stage}.train.batch_size to train one"
                )
        return self

    @model_validator(mode="after")
    def _scorer_has_its_drafts(self) -> Self:
        mtp = self.model.mtp
        if self.scorer.reads_drafts and (mtp.horizon == 1 or not may_draft(mtp.kind)):
            raise ValueError(
                f"scorer {self.scorer.name} needs heads that draft, and model.mtp.kind is {mtp.kind} with horizon "
                f"{mtp.horizon}; give model.mtp.kind=sequential and model.mtp.horizon=3"
            )
        return self

    @model_validator(mode="after")
    def _scorer_has_its_noise(self) -> Self:
        if self.scorer.reads_noise and self.data.noise is None:
            raise ValueError(
                f"scorer {self.scorer.name} reads which tokens are planted noise, and data.noise is null; give "
                "data.noise.kind=documents, or another scorer"
            )
        return self

    @model_validator(mode="after")
    def _weights_can_be_precomputed(self) -> Self:
        if not self.precompute_weights:
            return self
        name = self.scorer.name
        if not self.scorer.weighted:
            raise ValueError(
                f"precompute_weights is true, but scorer {name} computes no weights; choose another scorer"
            )
        if self.scorer.depends_on_batch:
            raise ValueError(
                f"precompute_weights is true, but the weights of scorer {name} depend on what else is in the batch; "
                "give scope 'sequence', or a scorer that weighs each row on its own"
            )
        if self.data.packing == "padded":
            raise ValueError(
                "precompute_weights is true, but rows of data.packing padded don't hold every token; give packed"
            )
        if self.scorer.reads_current:
            raise ValueError(
                f"precompute_weights is true, but scorer {name} needs the losses or drafts of the model in training, "
                "which change at every step; name a frozen model as scorer.current, if the scorer has that option"
            )
        return self

    def stage(self, name: StageName) -> FrozenModelConfig | None:
        """Return the group of a frozen model, if the recipe has it."""
        group: FrozenModelConfig | None = getattr(self, name)
        return group

    def frozen_models(self) -> list[FrozenModel]:
        """Return the trained models that the scorer reads: those of its stages, then those that its options name."""
        models = []
        for name in self.scorer.scored_by.stages:
            stage = self.stage(name)
            assert stage is not None
            models.append(FrozenModel(name, f"{name}.source", stage.source, stage.model_kind))
        for option, source in self.scorer.sources().items():
            models.append(FrozenModel(option.rpartition(".")[2], f"scorer.{option}", source, "language model"))
        return models

    def arms(self, others: Mapping[str, Recipe] | None = None) -> dict[str, Recipe]:
        """Return the recipe with each scorer of a comparison: uniform, its own, the controls of it, and others.

        Where noise is planted, also its own in the other mode and in another scope, and the truth.

        Args:
            others: recipes of further arms by name, which differ from this one in their scorer.

        Raises:
            RecipeError: its own scorer is uniform; another arm differs in more than its scorer, needs a model that
                this one has not, or has the name of one of its own.
        """
        if not self.scorer.weighted:
            raise RecipeError("compare needs a recipe whose scorer is not uniform, such as 'rho1'")
        scored = self.scorer.scored_by
        scorers: dict[str, ScorerConfig] = {"uniform": UniformScorerConfig(), scored.label: scored}
        if self.data.noise and isinstance(scored, ScoreConfig):
            mode: Any = "topk" if scored.mode == "softmax" else "softmax"
            scope: Any = "batch" if scored.scope == "sequence" else "sequence"
            scorers[f"{scored.label}-{mode}"] = scored.model_copy(update={"mode": mode})
            scorers[f"{scored.label}-{scope}"] = scored.model_copy(update={"scope": scope})
        scorers |= {name: load_class(name, SCORERS, "name")(name=name, of=scored) for name in CONTROLS}
        if self.data.noise:
            scorers["planted_truth"] = load_class("planted_truth", SCORERS, "name")(name="planted_truth")
        for name, other in (others or {}).items():
            self._check_arm(name, other, scorers)
            scorers[name] = other.scorer
        validation = self.validation.model_copy(update={"every": None, "at_start": False})
        same = {"precompute_weights": False, "validation": validation}
        return {name: self.model_copy(update={**same, "scorer": scorer}) for name, scorer in scorers.items()}

    def _check_arm(self, name: str, other: Recipe, arms: Mapping[str, ScorerConfig]) -> None:
        """Check one more arm of a comparison.

        Raises:
            RecipeError: as `arms`.
        """
        if other.model_copy(update={"scorer": self.scorer}) != self:
            raise RecipeError(
                f"--arm {name} changes more than the scorer; expected overrides of the scorer alone, such as "
                "scorer.temperature=2.0"
            )
        if name in arms:
            raise RecipeError(
                f"--arm {name} has the name of an arm of every comparison; expected overrides of the scorer, such as "
                "scorer.temperature=2.0"
            )
        if missing := [model.key for model in other.frozen_models() if model not in self.frozen_models()]:
            raise RecipeError(
                f"--arm {name} needs {' and '.join(missing)}, which the recipe's scorer {self.scorer.name} does not; "
                "compare a recipe that has it"
            )
