"""Native MTP modules: what transformers drafts with is read, trained and written back.

Checkpoints are those of a tiny random model, with modules added under the names of published ones.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from mtp_ce import MTPWrapper

V, D, LAYERS = 64, 16, 2
GLM = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "eos_token_id": None, "pad_token_id": 0,
    "moe_intermediate_size": 8, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def glm(folder: Path, modules: int = 1, copies: bool = True) -> dict[str, Tensor]:
    """Write a GLM-4-MoE with modules behind its layers; return all tensors."""
    torch.manual_seed(3)
    Glm4MoeForCausalLM(Glm4MoeConfig(**GLM, num_nextn_predict_layers=modules)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    last = f"model.layers.{LAYERS - 1}."
    layer = {name.removeprefix(last): x for name, x in tensors.items() if name.startswith(last)}
    for k in range(modules):
        prefix = f"model.layers.{LAYERS + k}."
        tensors |= {prefix + name: x + 0.1 * torch.randn_like(x) for name, x in layer.items()}
        tensors |= {
            f"{prefix}{name}.weight": 1 + 0.3 * torch.randn(D) for name in ("enorm", "hnorm", "shared_head.norm")
        }
        tensors[f"{prefix}eh_proj.weight"] = 0.2 * torch.randn(D, 2 * D)
        if copies:
            tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def loaded(folder: Path) -> Any:
    model = Glm4MoeForCausalLM.from_pretrained(folder)
    # transformers knows the numbers of published models alone.
    model._keys_to_ignore_on_load_unexpected = {rf"layers\.{LAYERS}\."}
    return model


def saved(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in set(index["weight_map"].values()):
        tensors |= load_file(folder / file)
    return tensors


def test_a_module_is_read_and_written_back_to_the_bit(tmp_path):
    source = glm(tmp_path / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper = MTPWrapper(loaded(tmp_path / "source"), heads="native")
    assert wrapper.horizon == 2
    wrapper.save_pretrained(tmp_path / "saved")
    ours = saved(tmp_path / "saved")
    assert ours.keys() == source.keys()
    assert all(torch.equal(ours[name], x) for name, x in source.items())
    assert not (tmp_path / "saved" / "mtp_heads.safetensors").exists()
