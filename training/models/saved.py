"""Save the trained model as files that other programs load.

    model/config.json, model.safetensors, ...           AutoModelForCausalLM.from_pretrained
    model/tokenizer.json, tokenizer_config.json         AutoTokenizer.from_pretrained
    model/mtp_heads.json, mtp_heads.safetensors         mtp_ce.MTPHeads.from_pretrained

All are in one folder, so it can be copied or uploaded as one model. A program that does not know the extra heads loads
an ordinary causal language model from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mtp_ce.training.storage.atomic import whole_folder


class Saves(Protocol):
    """An object that writes its files into a folder: a model or a tokenizer."""

    def save_pretrained(self, save_directory: Any, **options: Any) -> Any:
        """Write the files."""
        ...


def save_model(folder: Path, *parts: Saves, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write a model and what belongs to it; `folder` appears atomically, and replaces one that exists.

    Args:
        folder: the folder to create.
        parts: the model, then for example its tokenizer.
        state_dict: the model's tensors, if they were gathered from other ranks; None takes the model's own.

    Raises:
        OSError: it can't be written, such as to a full disk.
    """
    with whole_folder(folder, replace=True) as aside:
        model, *others = parts
        model.save_pretrained(aside, **({} if state_dict is None else {"state_dict": state_dict}))
        for part in others:
            part.save_pretrained(aside)
