"""Convert a model in one GGUF file, the format of llama.cpp, into the files that transformers writes.

Quantised weights become fp32. The result is cached under a hash of the file and made once: reading the tokenizer of a
GGUF file alone takes longer than loading the converted model.
"""

from __future__ import annotations

import copy
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtp_ce.training.errors import RecipeError, refuse_unloadable
from mtp_ce.training.storage.cache import cache_folder, cached


def converted_folder(file: Path) -> Path:
    """Return the cache folder of a file's model and tokenizer, whether or not it exists."""
    with file.open("rb") as opened:
        return cache_folder() / "gguf" / hashlib.file_digest(opened, "sha256").hexdigest()[:32]


def convert_gguf(key: str, file: Path) -> Path:
    """Return a folder with a file's model and tokenizer, in fp32.

    Args:
        key: recipe key that names the file, for messages.
        file: a causal language model of an architecture that transformers reads from GGUF.

    Raises:
        RecipeError: the package gguf is missing, or the file holds no such model.
    """
    if find_spec("gguf") is None:
        raise RecipeError(f"{key} is a GGUF file, and reading it needs the package gguf: pip install gguf")
    return cached(converted_folder(file), lambda aside: _convert(key, file, aside))


def _convert(key: str, file: Path, folder: Path) -> None:
    # Some releases of transformers keep weights quantised if a kernel for them is installed; older ones never do.
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where, options = file.parent, {"gguf_file": file.name}
    with refuse_unloadable(key, str(file)):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
        quantised = AutoModelForCausalLM.from_pretrained(
            where, dtype=torch.float32, trust_remote_code=False, **options, **dense
        )
    # transformers refuses to save a model that was read from a quantised file; a new model of the same weights saves.
    config = copy.deepcopy(quantised.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
