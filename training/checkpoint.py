"""The trained model as files that other programs read.

    model/config.json, model.safetensors, ...           AutoModelForCausalLM.from_pretrained
    model/tokenizer.json, tokenizer_config.json         AutoTokenizer.from_pretrained
    model/mtp_heads.json, mtp_heads.safetensors         mtp_ce.MTPHeads.from_pretrained

All in one folder, so that it can be copied or uploaded as one model; who knows nothing of the extra heads
loads an ordinary causal language model from it.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from mtp_ce.training.atomic import whole_folder
from mtp_ce.training.model import MultiTokenModel


def save_model(folder: Path, model: MultiTokenModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write model, tokenizer and heads; `folder` appears when all of it is there.

    Raises:
        FileExistsError: `folder` is there already.
    """
    with whole_folder(folder) as aside:
        model.trunk.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        model.heads.save_pretrained(aside)
