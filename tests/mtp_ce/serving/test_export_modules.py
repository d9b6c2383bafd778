"""Exported "sequential" modules: vLLM's classes read every tensor and compute the heads' logits at every depth."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from mtp_ce import MTPWrapper
from mtp_ce.serving.layouts import Serving
from mtp_ce.serving.mimo import export_mimo

TOKENS = torch.arange(2, 14)[None]
S = TOKENS.shape[1]
SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}


def wrap(architecture: str, horizon: int = 2, kind: str = "sequential", shared: bool = False, **config: Any) -> Any:
    """A tiny wrapper with all parameters changed from their initial values."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**SMALL, **config}))
    wrapper = MTPWrapper(model, horizon, heads=kind, shared=shared).eval()
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return wrapper


def rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


class MiMoOfVLLM:
    """vLLM's reading of a draft model's folder, and its calls of the module, without its parallel layers and its cache.

    Source: vllm-project/vllm 0.32, vllm/model_executor/models/mimo_mtp.py, whose configuration is that of the model
    served, and qwen2.py; vllm/v1/spec_decode/llm_base_proposer.py for the calls and the embeddings it replaces.
    """

    def __init__(self, folder: Path, wrapper: MTPWrapper, serving: Serving) -> None:
        draft = json.loads((folder / "config.json").read_text())
        assert draft["architectures"] == ["MiMoForCausalLM"]
        assert serving.tokens % draft["num_nextn_predict_layers"] == 0
        self.wrapper, self.config = wrapper, {**wrapper.causal.config.to_dict(), **serving.overrides}
        assert self.config["num_nextn_predict_layers"] == 1
        assert self.config["hidden_act"] == "silu"
        prefix = "model.mtp_layers.0."
        tensors = load_file(folder / "model.safetensors")
        read = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        self.unread = {name for name in tensors if not name.startswith(prefix)}
        expected = {
            *(f"{name}.weight" for name in ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")),
            *(f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
            *(f"self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")),
            *(f"{name}_proj.weight" for name in ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down")),
            *(f"self_attn.{name}_norm.weight" for name in "qk" if self.config.get("qk_norm", False)),
        }
        assert read.keys() == expected, "vLLM refuses a folder that leaves a parameter as it was"
        self.weights = {name: tensor.float() for name, tensor in read.items()}

    def norm(self, name: str, x: Tensor) -> Tensor:
        return rms(x, self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def module(self, embedded: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:  # [T, D]
        embedded = torch.where(positions[:, None] == 0, 0, embedded)
        joined = torch.cat([self.norm("hidden_layernorm", hidden), self.norm("token_layernorm", embedded)], -1)
        x = F.linear(joined, self.weights["input_proj.weight"])
        x = x + self.attention(self.norm("input_layernorm", x), positions)
        y = self.norm("post_attention_layernorm", x)
        gate, up, down = (self.weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return self.norm("final_layernorm", x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down))

    def attention(self, x: Tensor, positions: Tensor) -> Tensor:
        heads, kv = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size = self.config["hidden_size"] // heads
        q, k, v = (
            F.linear(x, self.weights[f"self_attn.{name}_proj.weight"], self.weights[f"self_attn.{name}_proj.bias"])
            .unflatten(-1, (-1, size))
            .transpose(0, 1)
            for name in "qkv"
        )
        if self.config.get("qk_norm", False):
            q, k = self.norm("self_attn.q_norm", q), self.norm("self_attn.k_norm", k)
        theta = self.config["rope_parameters"]["rope_theta"]
        angles = positions[:, None] / theta ** (torch.arange(0, size, 2) / size)
        q, k = (rotated(z, angles) for z in (q, k))
        k, v = (z.repeat_interleave(heads // kv, 0) for z in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=size**-0.5)
        return F.linear(out.transpose(0, 1).flatten(1), self.weights["self_attn.o_proj.weight"])

    def logits(self, tokens: Tensor, depth: int) -> Tensor:  # [S] -> [S - depth, V]
        """Logits of the draft at `depth` after each position, given that the drafts before it are the text's."""
        model = self.wrapper.causal
        table, output = model.get_input_embeddings().weight.float(), model.get_output_embeddings().weight.float()
        trunk = model.base_model(tokens[None]).last_hidden_state[0].float()
        found = []
        for t in range(S - depth):
            hidden = trunk[: t + 1]  # the accepted positions; later ones are appended, each at the next position
            for step in range(depth):
                end = t + 1 + step
                out = self.module(table[tokens[1 : end + 1]], torch.arange(end), hidden)
                hidden = torch.cat([hidden, out[-1:]])
            found.append(out[-1] @ output.T)
        return torch.stack(found)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@pytest.mark.parametrize(
    ("architecture", "horizon", "config"),
    [
        ("llama", 4, {"num_key_value_heads": 1}),
        ("llama", 2, {"tie_word_embeddings": True}),
        ("qwen2", 3, {"rms_norm_eps": 1e-3}),
        ("qwen3", 3, {"head_dim": 8}),
    ],
    ids=["llama", "horizon 2", "qwen2", "qwen3"],
)
def test_vllms_mimo_makes_the_logits_of_the_heads_at_every_depth(architecture, horizon, config, tmp_path):
    wrapper = wrap(architecture, horizon, shared=horizon > 2, **config)
    serving = export_mimo(wrapper, tmp_path / "mimo")
    assert (serving.method, serving.tokens) == ("mtp", horizon - 1)
    mimo = MiMoOfVLLM(tmp_path / "mimo", wrapper, serving)
    assert mimo.unread == set(), "the model served has embeddings and output layer"
    with torch.no_grad():
        heads = wrapper.head_logits(input_ids=TOKENS)
        for depth in range(1, horizon):
            torch.testing.assert_close(
                mimo.logits(TOKENS[0], depth), heads[depth][0, : S - depth], rtol=1e-4, atol=1e-4
            )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "several modules": ({"horizon": 3}, "has 'sequential' heads with horizon 3, 2 modules; expected one"),
    "heads of another kind": ({"kind": "layer"}, "has 'layer' heads with horizon 2; expected 'sequential'"),
    "no heads": ({"kind": "none", "horizon": 1}, "has 'none' heads with horizon 1; expected 'sequential'"),
    "biases": ({"attention_bias": True}, r"its layers differ in self_attn\.o_proj\.bias"),
    "an activation": ({"hidden_act": "gelu"}, "its activation is gelu"),
    "heads of another size": ({"architecture": "qwen3", "head_dim": 16}, r"differ in self_attn\.q_proj\.weight"),
    "a sliding window": ({"architecture": "mistral", "sliding_window": 4}, "have a sliding window of 4"),
    "a part of the head rotated": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        r"its partial_rotary_factor is 0\.5",
    ),
    "scaled attention": ({"architecture": "granite", "attention_multiplier": 0.5}, r"attention is scaled by 0\.5"),
    "scaled logits": ({"architecture": "granite", "logits_scaling": 4.0}, r"logits have a scale of 0\.25"),
    "scaled embeddings": ({"architecture": "gemma", "head_dim": 8}, "whose embeddings are scaled"),
    "other rotary embeddings": ({"architecture": "helium", "head_dim": 8}, "its layers compute something else"),
    "a mixture": ({"architecture": "mixtral", "num_local_experts": 2}, "its layers differ in mlp"),
    "no RMSNorm": ({"architecture": "starcoder2"}, "its configuration has no rms_norm_eps"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_vllms_mimo_does_not_compute_is_refused_by_name(what, tmp_path):
    options, words = REFUSED[what]
    with pytest.raises(ValueError, match=words) as refused:
        export_mimo(wrap(**{"architecture": "llama", **options}), tmp_path / "new")
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == []


def test_a_folder_with_a_model_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a model already"):
        export_mimo(wrap("llama"), tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]
