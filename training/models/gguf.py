"""Models in one GGUF file, as llama.cpp keeps them, turned into the files that transformers writes.

What was quantised is made fp32, the weights that the file stands for. The folder is kept under a hash of the file, so
it is made once: reading the file's tokenizer alone takes longer than loading what was made of it.
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

from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.atomic import whole_folder
from mtp_ce.training.storage.cache import cache_folder


def converted_folder(file: Path) -> Path:
    """Give the folder that a file's model and tokenizer are kept in, or will be."""
    with file.open("rb") as opened:
        return cache_folder() / "gguf" / hashlib.file_digest(opened, "sha256").hexdigest()[:32]


def convert_gguf(key: str, file: Path) -> Path:
    """Give a folder with a file's model and tokenizer, in fp32.

    Args:
        key: the recipe's key that names the file, for messages.
        file: a causal language model of an architecture that transformers reads from GGUF.

    Raises:
        RecipeError: the package gguf is missing, or the file holds no such model.
    """
    if find_spec("gguf") is None:
        raise RecipeError(f"{key} is a GGUF file, and reading it needs the package gguf: pip install gguf")
    folder = converted_folder(file)
    if folder.exists():
        return folder
    # Some releases keep the weights in their blocks where a kernel for those is installed; older ones never do.
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where, options = file.parent, {"gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        read = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options, **dense)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise RecipeError(f"{key} '{file}' can't be read: {' '.join(str(error).split())[:200]}") from None
    # What was read from a quantised file refuses to be saved; a model of the same weights does not.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    try:
        with whole_folder(folder) as aside:
            tokenizer.save_pretrained(aside)
            model.save_pretrained(aside)
    except FileExistsError:
        pass  # another process converted the same file meanwhile
    return folder
