"""The trained model as files that other programs read.

    model/config.json, model.safetensors, ...           AutoModelForCausalLM.from_pretrained
    model/tokenizer.json, tokenizer_config.json         AutoTokenizer.from_pretrained
    model/mtp_heads.json, mtp_heads.safetensors         mtp_ce.MTPHeads.from_pretrained

All in one folder, so that it can be copied or uploaded as one model; who knows nothing of the extra heads
loads an ordinary causal language model from it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch import Tensor

from mtp_ce.training.storage.atomic import whole_folder


class Saves(Protocol):
    """A model, a tokenizer, heads: what writes its own files into a folder."""

    def save_pretrained(self, save_directory: Any, **options: Any) -> Any:
        """Write the files."""
        ...


def save_model(folder: Path, *parts: Saves, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the parts of a model; `folder` appears when all of it is there.

    Args:
        folder: where.
        parts: the model, and what goes with it.
        state_dict: the model's tensors, where they were gathered from elsewhere; None takes its own.

    Raises:
        FileExistsError: `folder` is there already.
        OSError: it can't be written, such as to a full disk.
    """
    with whole_folder(folder) as aside:
        model, *others = parts
        try:
            model.save_pretrained(aside, **({} if state_dict is None else {"state_dict": state_dict}))
            for part in others:
                part.save_pretrained(aside)
        except SafetensorError as error:
            # safetensors says in words what the system said in numbers.
            if number := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from None
            raise
