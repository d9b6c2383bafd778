"""Models and tokenizers that are there already: a local folder, an s3:// address, or a name on the hub.

A reference or a critic must read the same tokens as the model in training. A vocabulary of the same size is not
enough: other entries under the same numbers would give scores without any meaning, and no error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from mtp_ce.training.schema import ControlScorerConfig, Recipe, RecipeError, Rho1ScorerConfig

Kind = Literal["language model", "critic"]


def sources_of(recipe: Recipe) -> dict[str, tuple[str, Kind]]:
    """Give the trained models that the recipe's scorer asks: key of the recipe -> where it is, what it must be."""
    scored = recipe.scored_by
    inside = "scorer.of" if isinstance(recipe.scorer, ControlScorerConfig) else "scorer"
    found: dict[str, tuple[str, Kind]] = {}
    if isinstance(scored, Rho1ScorerConfig):
        if recipe.reference and recipe.reference.source:
            found["reference.source"] = (recipe.reference.source, "language model")
        if scored.current:
            found[f"{inside}.current"] = (scored.current, "language model")
    elif scored and recipe.critic and recipe.critic.source:
        found["critic.source"] = (recipe.critic.source, "critic")
    return found


def find_sources(recipe: Recipe) -> None:
    """Look at what can be looked at without a network or torch.

    Raises:
        RecipeError: a local folder is missing or holds no model, or a model that does not fit.
    """
    named = {key: source for key, (source, _) in sources_of(recipe).items()}
    if recipe.data.tokenizer:
        named["data.tokenizer"] = recipe.data.tokenizer
    for key, source in named.items():
        if _is_path(source) and not Path(source).expanduser().is_dir():
            raise RecipeError(f"{key} is '{source}', which is not a folder; give one, an s3:// address or a hub name")
    for key, (source, kind) in sources_of(recipe).items():
        if _is_path(source):
            _check_config(key, source, Path(source).expanduser(), kind, recipe.data.vocab_size)


def fetch_source(key: str, source: str) -> Path:
    """Give the folder with a source's files, downloaded where it is not local.

    Raises:
        RecipeError: it is not there, or can't be reached.
    """
    if source.startswith("s3://"):
        from mtp_ce.training.storage import fetch_folder

        return fetch_folder(key, source)
    if _is_path(source):
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"{key} is '{source}', which is no folder here, and the hub does not give it ({reason})"
        ) from None


def fetch_model(key: str, source: str, kind: Kind, vocab_size: int) -> Path:
    """Give the folder of a trained model of the right kind and vocabulary size.

    Args:
        key: the recipe's key that names it.
        source: a folder, an s3:// address or a hub name.
        kind: what it must be.
        vocab_size: V of the model in training.

    Raises:
        RecipeError: it is not there, of another kind, or of another size.
    """
    folder = fetch_source(key, source)
    _check_config(key, source, folder, kind, vocab_size)
    return folder


def check_tokenizer(key: str, source: str, folder: Path, vocabulary: dict[str, int]) -> None:
    """Compare a trained model's tokenizer with the run's own.

    Args:
        key: the recipe's key that names the model.
        source: how the recipe calls it.
        folder: where it is.
        vocabulary: entries of the run's tokenizer and their ids.

    Raises:
        RecipeError: it has none, or another one.
    """
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder).get_vocab()
    except (OSError, ValueError) as error:
        raise RecipeError(f"{key} '{source}' has no tokenizer to compare: {' '.join(str(error).split())}") from None
    if theirs != vocabulary:
        shared = sum(vocabulary.get(entry) == number for entry, number in theirs.items())
        raise RecipeError(
            f"{key} '{source}' was trained with another tokenizer: {shared} of {len(vocabulary)} entries agree; "
            f"give data.tokenizer={source} and its data.vocab_size, or a model of this run's tokenizer"
        )


def _is_path(source: str) -> bool:
    """Hub names are `model` or `owner/model`; a folder of that name wins."""
    if source.startswith("s3://"):
        return False
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or Path(source).is_dir()


def _check_config(key: str, source: str, folder: Path, kind: Kind, vocab_size: int) -> None:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RecipeError(f"{key} '{source}' has no readable config.json; expected a model of transformers") from None
    architecture = " ".join(config.get("architectures") or ["model without a named architecture"])
    if kind == "critic" and not (
        architecture.endswith("ForTokenClassification") and len(config.get("id2label", {0: "", 1: ""})) == 1
    ):
        raise RecipeError(
            f"{key} '{source}' is a {architecture} without a value head; expected a ForTokenClassification of one label"
        )
    if kind == "language model" and not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise RecipeError(f"{key} '{source}' is a {architecture}; expected a causal language model")
    theirs = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if theirs != vocab_size:
        raise RecipeError(
            f"{key} '{source}' has a vocabulary of {theirs} entries and the model in training one of {vocab_size} "
            "(data.vocab_size); both must read the same tokens"
        )
