"""A whole recipe: its groups, and how their keys must agree. Nothing here needs torch."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from mtp_ce.training.config.groups import (
    CheckpointConfig,
    ControlName,
    ControlScorerConfig,
    CriticConfig,
    CriticScorerConfig,
    DataConfig,
    Group,
    ModelConfig,
    OptimizerConfig,
    PretrainedModelConfig,
    ReferenceConfig,
    Rho1ScorerConfig,
    ScorerConfig,
    TrackingConfig,
    TrainConfig,
    UniformScorerConfig,
    ValidationConfig,
)
from mtp_ce.training.errors import RecipeError


class EvaluationRecipe(Group):
    """What `eval-mtp` measures a checkpoint on; a run's own recipe has these groups, too."""

    data: DataConfig = Field(default_factory=DataConfig, description="the text, its split; the tokens are the model's")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="scoring of the held-out files")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes a GPU where there is one")

    @model_validator(mode="after")
    def _tokens_are_the_models(self) -> Self:
        for name in ("tokenizer", "vocab_size"):
            if (value := getattr(self.data, name)) is not None:
                raise ValueError(
                    f"data.{name} is {value}, but a checkpoint has a tokenizer and a vocabulary of its own"
                )
        return self


def _with_steps(name: str, train: Any, length: Any) -> Any:
    """Give a loop whose max_tokens has become steps; of what is not a valid one pydantic will speak."""
    if not isinstance(train, dict):
        return train
    budget, rows, steps = train.get("max_tokens"), train.get("batch_size"), train.get("steps")
    if not all(type(number) is int and number > 0 for number in (budget, rows, length)):
        return train
    assert budget is not None
    # Both stand in a recipe that was printed: they agree.
    needed = -(-budget // (rows * length))
    if steps not in (None, needed):
        raise ValueError(
            f"{name}.max_tokens {budget} is {needed} steps of {rows} x {length} tokens, and {name}.steps is {steps}; "
            f"give one of them, and {name}.steps=null or {name}.max_tokens=null"
        )
    return train | {"steps": needed}


class Recipe(Group):
    """Everything that decides a run: its stages (reference, critic, the model itself) and what they share."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="begins the name of the output folder and of the MLflow run",
    )
    description: str = Field(default="", description="one sentence, shown by --help")
    seed: int = Field(default=0, ge=0, lt=2**63, description="initial weights and the order of the rows")
    data: DataConfig = Field(default_factory=DataConfig, description="the text, its split, its tokens")
    model: ModelConfig = Field(description="the trunk and its heads")
    scorer: ScorerConfig = Field(default_factory=UniformScorerConfig, description="what gives every token its weight")
    precompute_weights: bool = Field(
        default=False, description="whether a stage of its own weighs every token once, before training"
    )
    reference: ReferenceConfig | None = Field(default=None, description="the reference model of rho1_excess")
    critic: CriticConfig | None = Field(default=None, description="the critic of critic_delta")
    optimizer: OptimizerConfig = Field(description="AdamW, learning rate, clipping")
    train: TrainConfig = Field(description="the loop")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="scoring of the held-out files")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="what a stopped run goes on from"
    )
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow")

    @model_validator(mode="before")
    @classmethod
    def _tokens_become_steps(cls, tree: Any) -> Any:
        """Fill in the steps of a token budget, so that everything else reads steps."""
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
    def _vocabulary_is_settled(self) -> Self:
        pretrained = isinstance(self.model, PretrainedModelConfig)
        if pretrained and self.data.vocab_size is not None:
            raise ValueError(
                f"data.vocab_size is {self.data.vocab_size}, but a pretrained model has a vocabulary of its own; "
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
                f"{self.train.steps}; the learning rate would never come down"
            )
        for name, stage in (("reference", self.reference), ("critic", self.critic)):
            if stage and stage.train and (stage.optimizer or self.optimizer).warmup_steps >= stage.train.steps:
                raise ValueError(
                    f"{name}.train.steps {stage.train.steps} is not above its warmup_steps "
                    f"{(stage.optimizer or self.optimizer).warmup_steps}; give {name}.optimizer or more steps"
                )
        return self

    @model_validator(mode="after")
    def _scorer_has_its_model(self) -> Self:
        scored = self.scored_by
        if isinstance(scored, Rho1ScorerConfig) and self.reference is None:
            raise ValueError(
                "scorer rho1_excess compares with a reference and there is none; give reference.source=FOLDER, an "
                "s3:// address or a hub name, or reference.train.steps and reference.train.batch_size to train one"
            )
        if isinstance(scored, CriticScorerConfig) and self.critic is None:
            raise ValueError(
                "scorer critic_delta asks a critic and there is none; give critic.source=FOLDER, an s3:// address or "
                "a hub name, or critic.train.steps and critic.train.batch_size to train one"
            )
        if self.precompute_weights and scored is None:
            raise ValueError("precompute_weights is true, but scorer uniform computes nothing; take another scorer")
        if self.precompute_weights and scored and (self.scorer.name == "random_matched" or scored.scope != "sequence"):
            raise ValueError(
                "precompute_weights is true, but these weights depend on what else is in the batch; take scope "
                "'sequence' and another scorer than random_matched"
            )
        if self.precompute_weights and self.data.packing == "padded":
            raise ValueError(
                "precompute_weights is true, but rows of data.packing padded don't hold every token; take packed"
            )
        if self.precompute_weights and isinstance(scored, Rho1ScorerConfig) and scored.current is None:
            raise ValueError(
                "precompute_weights is true, but the model in training has other losses at every step; name a frozen "
                "model as scorer.current"
            )
        return self

    @property
    def scored_by(self) -> Rho1ScorerConfig | CriticScorerConfig | None:
        """The scorer that asks a model, also behind a control; None for uniform weights."""
        scorer = self.scorer.of if isinstance(self.scorer, ControlScorerConfig) else self.scorer
        return None if isinstance(scorer, UniformScorerConfig) else scorer

    def arms(self) -> dict[str, Recipe]:
        """Give the recipe with each scorer that a comparison trains: uniform, its own, and the two controls of it.

        Raises:
            RecipeError: its own is uniform.
        """
        scored = self.scored_by
        if scored is None:
            raise RecipeError("compare needs a recipe whose scorer is not uniform, such as 'rho1'")
        scorers: dict[str, ScorerConfig] = {"uniform": UniformScorerConfig(), scored.name: scored}
        scorers |= {name: ControlScorerConfig(name=name, of=scored) for name in get_args(ControlName)}
        decoding = self.validation.decoding.model_copy(update={"prompts": 0})
        validation = self.validation.model_copy(update={"every": None, "decoding": decoding})
        same = {"precompute_weights": False, "validation": validation}
        return {name: self.model_copy(update={**same, "scorer": scorer}) for name, scorer in scorers.items()}
