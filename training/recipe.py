"""What a training run is made of: a YAML file, `a.b=c` overrides, and the models that check both.

    recipe = load_recipe("tiny", ["train.steps=100", "optimizer.lr=3e-4"])

Everything here is answered without torch, so that a mistake costs a second and not a minute. A key that
does not exist, a value of the wrong type or out of range, a key given twice: each is one `RecipeError`
whose message is one line. Every field says what it is and in which unit; `None` is written `null`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

RECIPES_FOLDER = Path(__file__).resolve().parent / "recipes"


class RecipeError(ValueError):
    """A mistake in what the user asked for; its message is one line that names it and the way out."""


class _Group(BaseModel):
    # strict: YAML already has types, and a lax `steps: yes` would train for one step.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataConfig(_Group):
    """The text, its split, its tokens."""

    corpus: str = Field(
        default="stdlib",
        description="'stdlib' (the Python standard library's own source) or a folder of text files",
    )
    suffix: str = Field(default=".py", min_length=1, description="which files of the corpus are documents, by suffix")
    holdout_fraction: float = Field(
        default=0.04,
        gt=0,
        lt=1,
        description="share of the files held out for validation, chosen by a hash of the path",
    )
    vocab_size: int = Field(default=8192, ge=257, description="entries of the byte-level BPE tokenizer, V")
    sequence_length: int = Field(default=256, ge=2, description="tokens in a packed row, S")


class MTPConfig(_Group):
    """The prediction heads."""

    kind: Literal["residual"] = Field(
        default="residual",
        description="form of an extra head: hidden + SiLU(Linear(hidden)), arXiv:2401.10774",
    )
    horizon: int = Field(default=4, ge=1, description="number of heads, H; head h predicts the token h + 1 further on")
    loss: Literal["linear", "logits"] = Field(
        default="linear", description="linear never builds the logits of all heads; logits builds them. The same loss"
    )


class ModelConfig(_Group):
    """The trunk, a Llama from transformers with random weights, and its heads."""

    kind: Literal["llama"] = Field(default="llama", description="architecture; trained from scratch")
    hidden_size: int = Field(ge=1, description="width of the hidden states, D")
    intermediate_size: int = Field(ge=1, description="width inside the feed-forward layers")
    layers: int = Field(ge=1, description="number of decoder layers")
    attention_heads: int = Field(ge=1, description="number of attention heads per layer")
    kv_heads: int = Field(ge=1, description="number of key/value heads per layer; divides attention_heads")
    tie_embeddings: bool = Field(default=True, description="whether input embedding and unembedding are one matrix")
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of the initial weights and embeddings")
    mtp: MTPConfig = Field(default_factory=MTPConfig, description="the prediction heads")

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


class UniformScorerConfig(_Group):
    """Every supervised token weighs 1."""

    name: Literal["uniform"] = Field(default="uniform", description="which scorer makes the token weights")


class OptimizerConfig(_Group):
    """AdamW with a linear warm-up and a cosine decay."""

    lr: float = Field(gt=0, description="peak learning rate")
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises from 0 to lr")
    final_lr_ratio: float = Field(
        default=0.1, ge=0, le=1, description="learning rate of the last step, as a share of lr"
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


class TrainConfig(_Group):
    """The loop."""

    steps: int = Field(ge=1, description="optimizer steps")
    batch_size: int = Field(ge=1, description="rows of sequence_length tokens per optimizer step")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="rows per forward; divides batch_size; null: all. Changes memory, not results",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes a GPU where there is one")
    log_every: int = Field(default=10, ge=1, description="steps between two lines of metrics")

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self


class ValidationConfig(_Group):
    """How the held-out files are scored; always all of them, unweighted, and always after the last step."""

    every: int | None = Field(
        default=None, ge=1, description="steps between two validations; null: after the last step only"
    )
    batch_size: int = Field(default=8, ge=1, description="rows per forward; changes memory, not results")


class TrackingConfig(_Group):
    """Where metrics go besides metrics.jsonl in the output folder."""

    kind: Literal["mlflow", "none"] = Field(default="mlflow", description="none works without mlflow installed")
    uri: str = Field(default="sqlite:///mlflow.db", min_length=1, description="MLflow tracking server or database")
    experiment: str = Field(default="mtp_ce", min_length=1, description="MLflow experiment that the run belongs to")


class Recipe(_Group):
    """Everything that decides a run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="begins the name of the output folder and of the MLflow run",
    )
    description: str = Field(default="", description="one sentence, shown by --help")
    seed: int = Field(default=0, ge=0, lt=2**63, description="initial weights and the order of the rows")
    data: DataConfig = Field(default_factory=DataConfig, description="the text, its split, its tokens")
    model: ModelConfig = Field(description="the trunk and its heads")
    scorer: UniformScorerConfig = Field(
        default_factory=UniformScorerConfig, description="what gives every token its weight"
    )
    optimizer: OptimizerConfig = Field(description="AdamW, learning rate, clipping")
    train: TrainConfig = Field(description="the loop")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="scoring of the held-out files")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow")

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
        return self


def shipped_recipes() -> dict[str, Path]:
    """Give the recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(RECIPES_FOLDER.glob("*.yaml"))}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, check the result.

    Args:
        name_or_path: a shipped recipe's name, or the path of a YAML file.
        overrides: `a.b=c`; c is read as YAML, and a later one wins over an earlier one.

    Raises:
        RecipeError: the file is missing or not YAML, or a key or value is wrong.
    """
    path = _find(name_or_path)
    tree = _parse(path)
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        # A misspelt group is also a missing one; the unknown key is what explains both.
        first, *others = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        more = f" (and {len(others)} more)" if others else ""
        raise RecipeError(_explain(first) + more) from None


def to_yaml(recipe: Recipe) -> str:
    """Write every key of a recipe, defaults included, as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True, width=100)


def without_password(recipe: Recipe) -> Recipe:
    """Give the recipe as it may be shown and stored: a password in the tracking URI becomes ***."""
    uri = re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", recipe.tracking.uri)
    return recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"uri": uri})})


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Give the values of a recipe by dotted key."""
    return dict(_leaves(recipe.model_dump()))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _find(name_or_path: str) -> Path:
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"recipe {name_or_path} is a folder; expected a YAML file")
    near = difflib.get_close_matches(name_or_path, shipped, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise RecipeError(f"recipe '{name_or_path}' is neither a file nor a shipped recipe ({', '.join(shipped)}){hint}")


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: a key given twice is an error, and 3e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else key_node
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' is given twice in the same group", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, wants 3.0e-4; everyone writes 3e-4.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where}{line}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: {' '.join(str(error).split())}") from None


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} can't be read: {error}") from None
    tree = _read_yaml(text, f"recipe {path}")
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path} holds {_kind(tree)}; expected groups of keys, see --print-config")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *groups, leaf = dotted.split(".")
    if not equals or not all([*groups, leaf]):
        raise RecipeError(f"override '{override}' is not of the form a.b=c")
    value = _read_yaml(text, f"override '{override}'")
    for depth, key in enumerate(groups):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise RecipeError(
                f"override '{override}' goes into '{'.'.join(groups[: depth + 1])}', a value and not a group"
            )
    tree[leaf] = value


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, field in model.model_fields.items():
        yield prefix + key
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _known_keys(field.annotation, f"{prefix}{key}.")


def _description(dotted: str) -> str:
    model: Any = Recipe
    field = None
    for key in dotted.split("."):
        field = model.model_fields.get(key) if hasattr(model, "model_fields") else None
        if field is None:
            return ""
        model = field.annotation
    return field.description or "" if field else ""


def _nearest_key(dotted: str) -> str | None:
    known = list(_known_keys(Recipe))
    leaf = dotted.rpartition(".")[2]
    # A right name in the wrong place comes first: `lr` means optimizer.lr and nothing spelt like it.
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    if elsewhere:
        return elsewhere[0]
    if near := difflib.get_close_matches(dotted, known, n=1):
        return near[0]
    leaves = {key.rpartition(".")[2]: key for key in known}
    spelt = difflib.get_close_matches(leaf, leaves, n=1)
    return leaves[spelt[0]] if spelt else None


def _explain(error: ErrorDetails) -> str:
    """Turn one pydantic error into one line: the key, what came, what was expected, the way out."""
    dotted = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        meant = _nearest_key(dotted)
        hint = f"did you mean '{meant}'?" if meant else "--print-config shows every key"
        return f"unknown key '{dotted}'; {hint}"
    if error["type"] == "missing":
        return f"missing key '{dotted}': {_description(dotted)}"
    if error["type"] == "value_error":
        return f"{dotted}: {error['ctx']['error']}" if dotted else str(error["ctx"]["error"])
    message = error["msg"].removeprefix("Input ").removeprefix("String ")
    if error["type"] in ("model_type", "model_attributes_type"):
        message = "should be a group of keys"
    meaning = _description(dotted)
    came = error["input"]
    shown = _kind(came) if isinstance(came, dict | list) else _as_yaml(came)
    hint = ""
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(str(came), choices, n=1)
        hint = f"; did you mean '{near[0]}'?" if near and len(choices) > 1 else ""
    return f"'{dotted}' is {shown}; it {message}{hint}{f' ({meaning})' if meaning else ''}"


def _as_yaml(value: Any) -> str:
    """Show a value as it is written in a recipe: null and true, not None and True."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "a group of keys"
    return "a list" if isinstance(value, list) else "nothing" if value is None else repr(value)
