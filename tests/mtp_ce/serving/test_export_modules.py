"""Exported "sequential" modules: vLLM's classes read every tensor and compute the heads' logits at every depth."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from mtp_ce import MTPWrapper
from mtp_ce.serving.deepseek import export_deepseek
from mtp_ce.serving.layouts import Serving
from mtp_ce.serving.mimo import export_mimo
from mtp_ce.serving.qwen import export_qwen

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


class Proposer:
    """vLLM's calls of an MTP module, one at every depth, without its cache.

    Source: vllm-project/vllm 0.32, vllm/v1/spec_decode/llm_base_proposer.py; embeddings and output layer are those of
    the model served.
    """

    wrapper: Any

    def module(self, embedded: Tensor, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:  # [T, D], all
        """Return what the logits are made of, and what a further depth reads."""
        raise NotImplementedError

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
                out, passed = self.module(table[tokens[1 : end + 1]], torch.arange(end), hidden)
                hidden = torch.cat([hidden, passed[-1:]])
            found.append(out[-1] @ output.T)
        return torch.stack(found)


class MiMoOfVLLM(Proposer):
    """vLLM's reading of a draft model's folder, without its parallel layers.

    Source: vllm-project/vllm 0.32, vllm/model_executor/models/mimo_mtp.py, whose configuration is that of the model
    served, and qwen2.py.
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

    def module(self, embedded: Tensor, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        embedded = torch.where(positions[:, None] == 0, 0, embedded)
        joined = torch.cat([self.norm("hidden_layernorm", hidden), self.norm("token_layernorm", embedded)], -1)
        x = F.linear(joined, self.weights["input_proj.weight"])
        x = x + self.attention(self.norm("input_layernorm", x), positions)
        y = self.norm("post_attention_layernorm", x)
        gate, up, down = (self.weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        out = self.norm("final_layernorm", x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down))
        return out, out

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


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


class ModuleOfVLLM(Proposer):
    """vLLM's reading of a module inside its model's folder. The decoder layer is transformers', which reads its files.

    Source: vllm-project/vllm 0.32, deepseek_mtp.py, glm4_moe_mtp.py, qwen3_next_mtp.py and qwen3_5_mtp.py.
    """

    def __init__(self, folder: Path, wrapper: Any) -> None:
        self.wrapper, config = wrapper, json.loads((folder / "config.json").read_text())
        self.kind, N = config["model_type"], config["num_hidden_layers"]
        self.epsilon = config["rms_norm_eps"]
        tensors = tensors_of(folder)
        # What the class is built with, and what finds its tensors.
        if self.kind in ("deepseek_v3", "glm4_moe"):
            assert config["num_nextn_predict_layers"] == 1
            prefix, decoder, names = f"model.layers.{N}.", "", ("hnorm", "enorm", "eh_proj", "shared_head.norm")
        else:
            count = "num_nextn_predict_layers" if self.kind == "qwen3_next" else "mtp_num_hidden_layers"
            assert config[count] == 1
            prefix, decoder = "mtp.", "layers.0."
            names = ("pre_fc_norm_hidden", "pre_fc_norm_embedding", "fc", "norm")
        module = {name.removeprefix(prefix): tensors.pop(name) for name in [*tensors] if name.startswith(prefix)}
        self.hnorm, self.enorm, self.proj, self.norm = (module.pop(f"{name}.weight").float() for name in names)
        assert all(name.startswith(decoder) for name in module)
        # The layer in the place of the model's last one, as transformers reads it.
        last = f"model.layers.{N - 1}."
        layer = {last + name.removeprefix(decoder): x for name, x in module.items()}
        assert layer.keys() == {name for name in tensors if name.startswith(last)}
        (folder / "as-last").mkdir()
        save_file({**tensors, **layer}, folder / "as-last" / "model.safetensors", metadata={"format": "pt"})
        (folder / "as-last" / "config.json").write_text(json.dumps(config))
        self.model = AutoModelForCausalLM.from_pretrained(folder / "as-last", attn_implementation="eager").model.eval()

    def rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms(x, weight + 1 if self.kind.startswith("qwen") else weight, self.epsilon)

    def module(self, embedded: Tensor, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if not self.kind.startswith("qwen"):
            embedded = torch.where(positions[:, None] == 0, 0, embedded)
        x = F.linear(torch.cat([self.rms(embedded, self.enorm), self.rms(hidden, self.hnorm)], -1), self.proj)[None]
        T = len(positions)
        mask = torch.full((1, 1, T, T), torch.finfo(x.dtype).min).triu(1)
        rotary = self.model.rotary_emb(x, positions[None])
        z = self.model.layers[-1](
            x, attention_mask=mask, position_ids=positions[None], position_embeddings=rotary, use_cache=False
        )[0]
        out = self.rms(z, self.norm)
        return out, z if self.kind == "glm4_moe" else out


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


EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "deepseek_v3": (
        export_deepseek,
        {
            **ROUTED,
            **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
        },
    ),
    "glm4_moe": (export_deepseek, {**ROUTED, "head_dim": 8}),
    "qwen3_next": (export_qwen, {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8}),
    "qwen3_5_text": (export_qwen, {}),
    "qwen3_5_moe_text": (export_qwen, {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8}),
}
HYBRID = {
    **{"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2},
    **{"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_in_its_models_files_makes_the_logits_of_the_heads(family, tmp_path):
    export, config = FAMILIES[family]
    wrapper = wrap(family, 3, shared=True, **(HYBRID if "qwen" in family else {}), **config)
    before = {name: x.clone() for name, x in wrapper.causal.state_dict().items()}
    serving = export(wrapper, tmp_path / "whole")
    assert (serving.method, serving.beside) == ("mtp", False)
    assert serving.tokens == (1 if family == "glm4_moe" else 2)
    assert bool(serving.note) == (family == "glm4_moe")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(x, before[name]) for name, x in alone.state_dict().items())
    module = ModuleOfVLLM(tmp_path / "whole", wrapper)
    with torch.no_grad():
        heads = wrapper.head_logits(input_ids=TOKENS)
        differences = [(module.logits(TOKENS[0], d) - heads[d][0, : S - d]).abs().max().item() for d in (1, 2)]
    assert all(difference < 1e-4 for difference in differences[: serving.tokens]), differences
    if family == "glm4_moe":
        assert differences[1] > 1e-2, "a further depth reads the hidden state before the norm"


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "qwen3_next"])
def test_an_exported_module_is_read_back_as_native_heads_and_exported_again(family, tmp_path):
    export, config = FAMILIES[family]
    wrapper = wrap(family, 3, shared=True, **(HYBRID if "qwen" in family else {}), **config)
    serving = export(wrapper, tmp_path / "whole")
    native = MTPWrapper(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), 3, heads="native").eval()
    with torch.no_grad():
        ours, theirs = (x.head_logits(input_ids=TOKENS) for x in (wrapper, native))
        for depth in range(serving.tokens + 1):
            expected, found = (x[depth][:, : S - depth] for x in (ours, theirs))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        native.heads.get_parameter("projections.0.weight").mul_(2)
    again = export(native, tmp_path / "again")
    assert (again.method, again.tokens, again.beside, again.note) == ("mtp", 2, False, "")
    before, after = (tensors_of(tmp_path / name) for name in ("whole", "again"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {"mtp.fc.weight" if "qwen" in family else "model.layers.2.eh_proj.weight"}
    other = export_deepseek if export is export_qwen else export_qwen
    with pytest.raises(ValueError, match=r"has an MTP module in the layout '\w+'; expected '\w+'\."):
        other(native, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_of_several_native_modules_it_is_said_that_one_drafts(tmp_path):
    export_deepseek(wrap("glm4_moe", **FAMILIES["glm4_moe"][1]), tmp_path / "one")
    tensors, config = tensors_of(tmp_path / "one"), json.loads((tmp_path / "one" / "config.json").read_text())
    further = {
        name.replace(".2.", ".3.", 1): x.clone() for name, x in tensors.items() if name[:15] == "model.layers.2."
    }
    (tmp_path / "two").mkdir()
    save_file(tensors | further, tmp_path / "two" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "two" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 2}))
    native = MTPWrapper(AutoModelForCausalLM.from_pretrained(tmp_path / "two"), 3, heads="native")
    serving = export_deepseek(native, tmp_path / "whole")
    assert "the first of several modules" in serving.note
    assert tensors_of(tmp_path / "whole").keys() == (tensors | further).keys()
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["num_nextn_predict_layers"] == 2


def test_adapters_are_merged_into_the_model_with_the_module(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = AutoConfig.for_model("glm4_moe", **SMALL, **FAMILIES["glm4_moe"][1])
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    wrapper = MTPWrapper(model, 2, heads="sequential").eval()
    export_deepseek(wrapper, tmp_path)
    native = MTPWrapper(AutoModelForCausalLM.from_pretrained(tmp_path), 2, heads="native").eval()
    with torch.no_grad():
        ours, theirs = (x.head_logits(input_ids=TOKENS) for x in (wrapper, native))
    for expected, found in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found[:, : S - 1], expected[:, : S - 1], rtol=1e-4, atol=1e-4)


UNFIT: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "another family": (
        export_deepseek,
        "llama",
        {},
        "has model_type 'llama'; expected one of 'deepseek_v3', 'glm4_moe'",
    ),
    "the other layout": (export_qwen, "glm4_moe", ROUTED | {"head_dim": 8}, "Try 'deepseek' for this one"),
    "a dense last layer": (
        export_deepseek,
        "glm4_moe",
        ROUTED | {"head_dim": 8, "first_k_dense_replace": 2},
        "with a dense last layer",
    ),
    "linear attention": (
        export_qwen,
        "qwen3_5_text",
        HYBRID | {"layer_types": ["full_attention", "linear_attention"]},
        "with linear attention in its last layer",
    ),
    "a dense layer of a mixture": (
        export_qwen,
        "qwen3_next",
        HYBRID | FAMILIES["qwen3_next"][1] | {"mlp_only_layers": [1]},
        "with a dense last layer, .* expected a mixture",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_model_whose_module_engines_build_otherwise_is_refused_by_name(what, tmp_path):
    export, family, config, words = UNFIT[what]
    with pytest.raises(ValueError, match=words) as refused:
        export(wrap(family, **config), tmp_path / "new")
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == []


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


@pytest.mark.parametrize("family", ["llama", "glm4_moe"])
def test_a_folder_with_a_model_is_left_alone(family, tmp_path):
    export, config = (export_mimo, {}) if family == "llama" else FAMILIES[family]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a model already"):
        export(wrap(family, **config), tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]
