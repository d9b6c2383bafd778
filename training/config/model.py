"""Recipe keys of the model in training: its trunk and its prediction heads."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from mtp_ce.heads.kinds import EXTRA_PATHS, is_in_model, may_be_shared, may_have_parameters
from mtp_ce.registry import check_name
from mtp_ce.training.config.group import Group


class MTPConfig(Group):
    """The prediction heads."""

    kind: str = Field(
        default="residual",
        description="form of the extra heads. residual: residual blocks; layer: decoder layers; sequential: a chain of "
        "decoder layers; native: the MTP modules in the files of a pretrained model; teacher_forcing: no parameters; "
        "package.module:Class: your own class",
    )
    horizon: int = Field(default=4, ge=1, description="H: number of heads; head h predicts token t + 1 + h")
    shared: bool = Field(
        default=False,
        description="sequential: one module for all extra heads, fed its own output, which drafts to any depth",
    )
    trunk: Literal["joint", "detached", "frozen"] = Field(
        default="joint",
        description="joint: the whole model is trained; detached: only the heads, no gradient reaches the trunk; "
        "frozen: as detached, and the trunk's parameters have requires_grad=False",
    )
    targets: Literal["text", "trunk"] = Field(
        default="text",
        description="what the heads learn to predict. text: the tokens of the text; trunk: the trunk's own greedy "
        "token in each place, with which an engine compares a draft; for a trunk that is not joint",
    )
    head_reduction: Literal["live", "horizon", "target"] = Field(
        default="live",
        description="what a head's loss is divided by. live: the heads with a target at its position; horizon: H; "
        "target: the heads that predict its token, so that every token counts once: for data with masked prompts",
    )
    loss: Literal["linear", "logits"] = Field(
        default="linear",
        description="linear: never builds the logits of all heads; logits: builds them. The value is the same",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="whether heads recompute their activations in the backward, one head at a time, for long rows and "
        "many heads. train.activation_checkpointing is for the model and its heads. Changes memory only",
    )

    @field_validator("kind")
    @classmethod
    def _kind_is_known(cls, kind: str) -> str:
        check_name(kind, EXTRA_PATHS, "kind")
        return kind

    @model_validator(mode="after")
    def _has_parameters_to_train(self) -> Self:
        if self.trunk != "joint" and (not may_have_parameters(self.kind) or self.horizon == 1):
            raise ValueError(
                f"trunk {self.trunk} with kind {self.kind} and horizon {self.horizon} leaves no parameter to train; "
                "give trunk joint, or heads that have parameters"
            )
        return self

    @model_validator(mode="after")
    def _targets_stay(self) -> Self:
        if self.targets == "trunk" and self.trunk == "joint":
            raise ValueError(
                "targets trunk with trunk joint would train the trunk on its own output; give trunk detached, or "
                "targets text"
            )
        return self

    @model_validator(mode="after")
    def _can_be_shared(self) -> Self:
        if self.shared and not may_be_shared(self.kind):
            raise ValueError(f"shared is true with kind {self.kind}; give kind sequential, or shared false")
        return self


class TrunkConfig(Group):
    """A Llama of transformers with random weights."""

    kind: Literal["llama"] = Field(
        default="llama", description="llama: trained from scratch; pretrained: training continues from a trained model"
    )
    hidden_size: int = Field(ge=1, description="D: width of the hidden states")
    intermediate_size: int = Field(ge=1, description="width inside the feed-forward layers")
    layers: int = Field(ge=1, description="number of decoder layers")
    attention_heads: int = Field(ge=1, description="number of attention heads per layer")
    kv_heads: int = Field(ge=1, description="number of key/value heads per layer; divides attention_heads")
    tie_embeddings: bool = Field(default=True, description="whether input embedding and unembedding are one matrix")
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of the initial weights and embeddings")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.hidden_size % (2 * self.attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not an even multiple of attention_heads "
                f"{self.attention_heads}; rotary embeddings need an even width per head"
            )
        if self.attention_heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide attention_heads {self.attention_heads}")
        return self


class LlamaModelConfig(TrunkConfig):
    """A trunk with random weights and its heads."""

    mtp: MTPConfig = Field(default_factory=MTPConfig, description="the prediction heads")

    @model_validator(mode="after")
    def _heads_need_no_files(self) -> Self:
        if is_in_model(self.mtp.kind):
            raise ValueError(
                f"mtp.kind {self.mtp.kind} reads MTP modules from files of a model, and kind {self.kind} has random "
                "weights; give kind pretrained, or another mtp.kind"
            )
        return self


class PretrainedModelConfig(Group):
    """A trained causal language model and its heads."""

    kind: Literal["pretrained"] = Field(
        description="llama: trained from scratch; pretrained: training continues from a trained model"
    )
    source: str = Field(
        min_length=1,
        description="a folder or GGUF file, package:NAME/FILE inside an installed Python package, an s3:// address or "
        "a hub name; training continues from heads that are saved beside it",
    )
    mtp: MTPConfig = Field(default_factory=MTPConfig, description="the prediction heads")


ModelConfig = Annotated[LlamaModelConfig | PretrainedModelConfig, Field(discriminator="kind")]
