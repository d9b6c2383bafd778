"""The groups of a recipe: every key with its meaning, unit and range.

Strict: a key that does not exist, a value of the wrong type or out of range is an error. `None` is written `null`.
Nothing here needs torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mtp_ce.heads.kinds import EXTRA_PATHS, may_have_parameters
from mtp_ce.registry import check_name, is_class_path


class Group(BaseModel):
    """Named keys of a recipe, all of which are known."""

    # strict: YAML already has types, and a lax `steps: yes` would train for one step.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataConfig(Group):
    """The text, its split, its tokens."""

    corpus: str = Field(
        default="stdlib",
        min_length=1,
        description="'stdlib' (the Python standard library's own source), a folder of files, a .jsonl, .parquet or "
        ".txt file, a glob of those, an s3:// address of any, or a data set's hub name",
    )
    reader: str | None = Field(
        default=None,
        description="a reader of your own for corpus and validation_corpus, as package.module:Class; null: chosen by "
        "the address",
    )
    subset: str | None = Field(default=None, min_length=1, description="which part of a hub data set, by its name")
    split: str = Field(default="train", min_length=1, description="which split of a hub data set")
    suffix: str = Field(
        default=".py",
        min_length=1,
        description="which files of a folder are read, by suffix: each a document, those of .jsonl and .parquet each "
        "a table of them",
    )
    text_field: str = Field(default="text", min_length=1, description="field of a row that holds the document")
    prompt_field: str | None = Field(
        default=None,
        min_length=1,
        description="field of a row that holds what is read but not learnt; null: no prompts",
    )
    completion_field: str | None = Field(
        default=None, min_length=1, description="field of a row that holds what is learnt after the prompt"
    )
    holdout_fraction: float = Field(
        default=0.04,
        gt=0,
        lt=1,
        description="share held out for validation, chosen by a hash: of a file's path, or of a row's content",
    )
    validation_corpus: str | None = Field(
        default=None,
        min_length=1,
        description="what validation reads, named as corpus is, which is then all trained on; null: holdout_fraction",
    )
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="a folder, an s3:// address or a hub name; null: the pretrained model's own, or else a byte-level "
        "BPE, trained on the corpus",
    )
    vocab_size: int | None = Field(
        default=None,
        ge=257,
        description="V: entries of the tokenizer trained here; for another one at least its own; null: those of a "
        "pretrained model",
    )
    sequence_length: int = Field(default=256, ge=2, description="tokens in a row, S")
    packing: Literal["packed", "padded"] = Field(
        default="packed",
        description="packed: documents end to end, cut into rows; padded: a row each, cut at its end or padded",
    )

    @field_validator("reader")
    @classmethod
    def _reader_is_a_class(cls, reader: str | None) -> str | None:
        if reader is not None and not is_class_path(reader):
            raise ValueError(f"it is '{reader}'; expected a class of your own as package.module:Class, or null")
        return reader

    @model_validator(mode="after")
    def _prompts_have_completions(self) -> Self:
        if (self.prompt_field is None) != (self.completion_field is None):
            here, missing = ("prompt", "completion") if self.prompt_field else ("completion", "prompt")
            raise ValueError(f"{here}_field is given without {missing}_field; data of prompts needs both")
        return self


class MTPConfig(Group):
    """The prediction heads."""

    kind: str = Field(
        default="residual",
        description="form of the extra heads. residual: small blocks; layer: decoder layers; sequential: a chain of "
        "layers; teacher_forcing: no parameters; package.module:Class: a class of your own",
    )
    horizon: int = Field(default=4, ge=1, description="number of heads, H; head h predicts the token h + 1 further on")
    trunk: Literal["joint", "detached", "frozen"] = Field(
        default="joint",
        description="joint: all of the model learns; detached: the heads alone, the loss does not reach the model; "
        "frozen: likewise, and the model's parameters want no gradient",
    )
    loss: Literal["linear", "logits"] = Field(
        default="linear", description="linear never builds the logits of all heads; logits builds them. The same loss"
    )

    @field_validator("kind")
    @classmethod
    def _kind_is_known(cls, kind: str) -> str:
        check_name(kind, EXTRA_PATHS, "kind")
        return kind

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if self.trunk != "joint" and (not may_have_parameters(self.kind) or self.horizon == 1):
            raise ValueError(
                f"trunk {self.trunk} with kind {self.kind} and horizon {self.horizon} leaves nothing that learns; "
                "take joint, or heads that have parameters"
            )
        return self


class TrunkConfig(Group):
    """A Llama from transformers with random weights."""

    kind: Literal["llama"] = Field(
        default="llama", description="llama: trained from scratch; pretrained: a trained model goes on learning"
    )
    hidden_size: int = Field(ge=1, description="width of the hidden states, D")
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
                f"{self.attention_heads}; rotary positions need an even width per head"
            )
        if self.attention_heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide attention_heads {self.attention_heads}")
        return self


class LlamaModelConfig(TrunkConfig):
    """A trunk with random weights and its heads."""

    mtp: MTPConfig = Field(default_factory=MTPConfig, description="the prediction heads")


class PretrainedModelConfig(Group):
    """A trained causal language model and its heads."""

    kind: Literal["pretrained"] = Field(
        description="llama: trained from scratch; pretrained: a trained model goes on learning"
    )
    source: str = Field(
        min_length=1,
        description="a folder or GGUF file, package:NAME/FILE inside an installed Python package, an s3:// address or "
        "a hub name; heads that are saved beside it go on learning",
    )
    mtp: MTPConfig = Field(default_factory=MTPConfig, description="the prediction heads")


ModelConfig = Annotated[LlamaModelConfig | PretrainedModelConfig, Field(discriminator="kind")]


class UniformScorerConfig(Group):
    """Every supervised token weighs 1."""

    name: Literal["uniform"] = Field(default="uniform", description="which scorer makes the token weights")


class _ScoreConfig(Group):
    """How scores become weights of mean 1; the options of `normalize_weights`."""

    mode: Literal["softmax", "topk"] = Field(
        default="softmax",
        description="softmax: a soft weight; topk: the highest scores share it all, arXiv:2404.07965",
    )
    temperature: float = Field(default=0.7, gt=0, description="of the soft form, in standard deviations")
    eps: float = Field(default=0.05, ge=0, le=1, description="smallest weight of the soft form")
    w_max: float = Field(default=3.0, ge=1, description="largest weight of the soft form")
    top_fraction: float = Field(default=0.6, gt=0, le=1, description="share of the tokens that topk keeps")
    scope: Literal["sequence", "batch", "global"] = Field(
        default="sequence",
        description="over which tokens the mean is 1: a document in its row, the rows of a forward, those of all ranks",
    )

    def normalization(self) -> dict[str, Any]:
        """Give the options as `normalize_weights` takes them."""
        return self.model_dump(include=set(_ScoreConfig.model_fields))


class Rho1ScorerConfig(_ScoreConfig):
    """Excess cross entropy over a reference model, arXiv:2404.07965."""

    name: Literal["rho1_excess"] = Field(description="which scorer makes the token weights")
    current: str | None = Field(
        default=None,
        min_length=1,
        description="a frozen model to compare with the reference: a folder, an s3:// address or a hub name; "
        "null: the model in training",
    )


class CriticScorerConfig(_ScoreConfig):
    """Change of a critic's value at the token."""

    name: Literal["critic_delta"] = Field(description="which scorer makes the token weights")
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount of the next value")
    gae_lambda: float = Field(
        default=0.0, ge=0, le=1, description="0: the change at the token alone; 1: later ones too"
    )


ModelScorerConfig = Annotated[Rho1ScorerConfig | CriticScorerConfig, Field(discriminator="name")]


ControlName = Literal["shuffled", "random_matched"]


class ControlScorerConfig(Group):
    """Another scorer's weights on other tokens: shuffled within each sequence, or anywhere in the rows of a forward."""

    name: ControlName = Field(description="which scorer makes the token weights")
    of: ModelScorerConfig = Field(description="the scorer whose weights are moved")


ScorerConfig = Annotated[
    UniformScorerConfig | Rho1ScorerConfig | CriticScorerConfig | ControlScorerConfig, Field(discriminator="name")
]


class OptimizerConfig(Group):
    """AdamW with a linear warm-up and a cosine decay, of both learning rates alike."""

    lr: float = Field(gt=0, description="peak learning rate")
    heads_lr: float | None = Field(
        default=None, gt=0, description="peak learning rate of the extra heads, which begin untrained; null: lr"
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="steps over which the learning rate rises from 0, that of the first step, to lr"
    )
    final_lr_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="where the cosine ends, which a step after the last one would have, as a share of lr",
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
        description="largest L2 norm of the whole gradient; null logs the norm but never clips",
    )


class StageTrainConfig(Group):
    """The loop of a stage."""

    steps: int = Field(ge=1, description="optimizer steps; null where max_tokens says how many")
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens of all steps, batch_size rows of sequence_length each, padding counted; the last step may "
        "go beyond. Stands in place of steps",
    )
    batch_size: int = Field(ge=1, description="rows per optimizer step; of a critic, pairs of functions")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="rows per forward; divides batch_size; null: all. Changes memory, not results, unless rows are "
        "weighed together: by scope batch or global, or random_matched",
    )
    log_every: int = Field(default=10, ge=1, description="steps between two lines of metrics")

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self


class TrainConfig(StageTrainConfig):
    """The loop of the last stage, and the device of all."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes a GPU where there is one")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="of forward and backward, and of the models that a scorer asks, whose scores bf16 makes coarser; "
        "parameters, sums of gradients and the optimizer stay fp32",
    )
    activation_checkpointing: bool = Field(
        default=False, description="whether layers compute their activations again in the backward. Changes memory only"
    )
    cpu_offload: bool = Field(
        default=False, description="whether parameters and the optimizer stay in main memory. Changes memory only"
    )


class _FrozenModelConfig(Group):
    """A model that only scores: taken as it is, or trained in a stage of its own."""

    source: str | None = Field(
        default=None,
        min_length=1,
        description="a trained model: a folder, an s3:// address or a hub name; null: it is trained here",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="initial weights and the order of the data")
    model: TrunkConfig | None = Field(
        default=None,
        description="its sizes; null: those of the recipe's `model`, whose pretrained weights it starts from",
    )
    optimizer: OptimizerConfig | None = Field(default=None, description="null: the recipe's `optimizer`")
    train: StageTrainConfig | None = Field(default=None, description="the loop; needed where source is null")

    @model_validator(mode="after")
    def _can_be_trained(self) -> Self:
        if self.source is None and self.train is None:
            raise ValueError("neither source nor train is given; name a trained model or say how to train one")
        return self


class ReferenceConfig(_FrozenModelConfig):
    """The reference of rho1_excess: a next-token model of the text that one wants more of."""

    documents: Literal["documented", "all"] = Field(
        default="documented",
        description="what it is trained on: public modules with a docstring, or every training file",
    )


class CriticConfig(_FrozenModelConfig):
    """The critic of critic_delta: says at every token whether the function will compile."""

    @model_validator(mode="after")
    def _counts_steps(self) -> Self:
        if self.train and self.train.max_tokens is not None:
            raise ValueError("train.max_tokens is given, but a critic learns from pairs of functions; give train.steps")
        return self

    objective: Literal["ranking", "regression"] = Field(
        default="ranking",
        description="ranking: intact above corrupted; regression: the value is the chance to compile",
    )
    corruption: Literal["delete", "swap", "both"] = Field(
        default="both", description="how functions are corrupted: a token deleted, two tokens swapped"
    )


class DecodingConfig(Group):
    """Greedy decoding from held-out text, by the model alone and with the heads drafting."""

    prompts: int = Field(default=8, ge=0, description="how many, spread over the held-out files; 0: no decoding")
    prompt_tokens: int = Field(default=64, ge=1, description="tokens of held-out text in a prompt")
    new_tokens: int = Field(default=64, ge=2, description="tokens to decode from each, at most")


class ValidationConfig(Group):
    """How the held-out files are scored: unweighted, and always after the last step."""

    every: int | None = Field(
        default=None, ge=1, description="steps between two validations; null: after the last step only"
    )
    at_start: bool = Field(default=False, description="whether to validate before the first step, too")
    rows: int | None = Field(
        default=None, ge=1, description="how many rows, spread over the held-out files; null: all of them"
    )
    batch_size: int = Field(default=8, ge=1, description="rows per forward; changes memory, not results")
    decoding: DecodingConfig = Field(
        default_factory=DecodingConfig, description="what the heads are worth in speculative decoding, at the end"
    )


class CheckpointConfig(Group):
    """The state of the loop on disk, from which a run goes on (--resume) as if it had never stopped."""

    every: int | None = Field(
        default=200, ge=1, description="steps between two checkpoints; null: only when the run is stopped"
    )
    keep: int = Field(default=2, ge=1, description="how many to keep, the newest; older ones are removed")
    upload: str | None = Field(
        default=None,
        pattern=r"^s3://[^/]+/.+",
        description="where copies of them and the trained model go, below the name of the output folder: "
        "s3://bucket/prefix",
    )


class TrackingConfig(Group):
    """Where metrics go besides metrics.jsonl in the output folder."""

    kind: str = Field(
        default="mlflow",
        min_length=1,
        description="mlflow; none, which needs no mlflow; or a tracker of your own as package.module:Class",
    )
    uri: str = Field(default="sqlite:///mlflow.db", min_length=1, description="MLflow tracking server or database")
    experiment: str = Field(default="mtp_ce", min_length=1, description="MLflow experiment that the run belongs to")
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of a tracker of your own, stored with the recipe"
    )
