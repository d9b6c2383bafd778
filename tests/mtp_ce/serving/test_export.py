"""Exported folders: transformers reads the model, mtp_ce the heads, vLLM the Medusa heads, with nothing changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from mtp_ce import MTPHeads, MTPWrapper
from mtp_ce.serving.base import export_base
from mtp_ce.serving.heads import export_heads
from mtp_ce.serving.medusa import export_medusa

V, D, H = 61, 16, 4
TOKENS = torch.arange(2, 26).view(2, 12)
SMALL = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}


def wrap(architecture: str = "llama", kind: Any = "residual", horizon: int = H, **config: Any) -> MTPWrapper:
    """A tiny model with all parameters changed from their initial values, heads and biases included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SMALL, **config))
    return moved(MTPWrapper(model, horizon, heads=kind)).eval()


def moved(module: Any) -> Any:
    """Change the trainable parameters of a module."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


class MedusaOfVLLM(nn.Module):
    """vLLM's reading of a draft model's folder, reimplemented without its parallel layers.

    Source: vllm-project/vllm, vllm/transformers_utils/configs/medusa.py (`from_pretrained`), and
    vllm/model_executor/models/medusa.py (`Medusa.__init__`, `compute_logits`, `load_weights`).
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        config: dict[str, Any] = {}
        for key, value in json.loads((folder / "config.json").read_text()).items():
            heads, layers = ("num" in key and word in key for word in ("heads", "layers"))
            config["num_heads" if heads else "num_hidden_layers" if layers else key] = value
        assert (config["model_type"], config["architectures"]) == ("medusa", ["MedusaModel"])
        sizes, bias = config["hidden_size"], config.get("medusa_fc_bias", False)
        self.blocks = nn.ModuleList(nn.Module() for _ in range(config["num_heads"]))
        for block in self.blocks:
            block.layers = nn.ModuleList(nn.Linear(sizes, sizes, bias) for _ in range(config["num_hidden_layers"]))
        assert config.get("truncated_vocab_size", config["vocab_size"]) == config["vocab_size"], "wants a token_map"
        self.shared = config.get("original_lm_head", False)
        output = [nn.Linear(sizes, config["vocab_size"], False) for _ in self.blocks]
        if self.shared:
            self.lm_head = output[0]
        else:
            self.lm_heads = nn.ModuleList(output)
        self.scale = config.get("logit_scale", 1.0)
        self.unread = self.load(folder)

    def load(self, folder: Path) -> set[str]:
        """Load all parameters; return the names that vLLM would ignore."""
        parameters, unread, filled = dict(self.named_parameters()), set(), set()
        for file in folder.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                ours = name.replace("medusa_heads.", "")
                if self.shared and ours == "lm_heads.0.weight":
                    ours = "lm_head.weight"
                if ours not in parameters:
                    unread.add(name)
                    continue
                assert tensor.shape == parameters[ours].shape, name
                parameters[ours].data = tensor
                filled.add(ours)
        assert filled == parameters.keys(), "vLLM refuses a folder that leaves a parameter as it was"
        return unread

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """Logits of every draft token, of the hidden states that the model's output layer reads."""
        logits = []
        for i, block in enumerate(self.blocks):
            x = hidden
            for layer in block.layers:
                x = x + F.silu(layer(x))
            logits.append(F.linear(x, (self.lm_head if self.shared else self.lm_heads[i]).weight) * self.scale)
        return logits


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"tie_word_embeddings": True, "dtype": torch.bfloat16}),
        ("llama", {"tie_word_embeddings": False}),
        ("gpt_neox", {}),
        ("granite", {"logits_scaling": 4.0}),
    ],
    ids=["tied", "untied", "gpt_neox", "scaled"],
)
def test_vllms_medusa_reads_every_tensor_and_makes_the_logits_of_the_heads(architecture, config, tmp_path):
    wrapper = wrap(architecture, **config)
    export_medusa(wrapper, tmp_path / "medusa")
    medusa = MedusaOfVLLM(tmp_path / "medusa")
    assert medusa.unread == set()
    with torch.no_grad():
        expected = wrapper.head_logits(input_ids=TOKENS)
        got = medusa(wrapper.causal.base_model(TOKENS).last_hidden_state)
    assert len(got) == H - 1
    for ours, theirs in zip(expected[1:], got, strict=True):
        assert theirs.dtype == config.get("dtype", torch.float32)
        if "logits_scaling" in config:
            # vLLM scales logits where the wrapper scales hidden states.
            torch.testing.assert_close(theirs, ours)
        else:
            assert torch.equal(theirs, ours)
    assert not torch.equal(expected[1], expected[2]), "heads that are alike would hide a swap"


def test_the_output_layer_is_written_once_for_all_medusa_heads(tmp_path):
    export_medusa(wrap(tie_word_embeddings=True), tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert [name for name in names if "lm_head" in name] == ["lm_head.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_is_the_model_bit_for_bit_and_has_no_heads(dtype, tmp_path):
    wrapper = wrap(dtype=dtype)
    export_base(wrapper, tmp_path / "base")
    assert not any("mtp" in name for name in os.listdir(tmp_path / "base"))
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert type(alone) is type(wrapper.causal)
    logits = alone(TOKENS).logits
    assert logits.dtype == dtype
    assert torch.equal(logits, wrapper(TOKENS).logits)


@pytest.mark.parametrize("kind", ["residual", "layer", "sequential"])
def test_heads_and_base_in_one_folder_are_a_checkpoint(kind, tmp_path):
    wrapper = wrap(kind=kind)
    export_heads(wrapper, tmp_path / "heads")
    assert sorted(os.listdir(tmp_path / "heads")) == ["mtp_heads.json", "mtp_heads.safetensors"]
    if kind == "residual":
        for name, tensor in MTPHeads.from_pretrained(tmp_path / "heads").state_dict().items():
            assert torch.equal(tensor, wrapper.heads.state_dict()[name])
    export_base(wrapper, tmp_path / "both")
    export_heads(wrapper, tmp_path / "both")
    again = MTPWrapper.from_pretrained(tmp_path / "both").eval()
    for one, other in zip(again.head_logits(input_ids=TOKENS), wrapper.head_logits(input_ids=TOKENS), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("read", ["as made", "as saved"])
def test_adapters_are_merged_into_the_base_and_stay_apart_in_the_wrapper(read, tmp_path):
    """A folder that PEFT wrote comes back from transformers without PEFT's wrapper."""
    from peft import LoraConfig, get_peft_model

    wrap().causal.save_pretrained(tmp_path / "pretrained")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained")
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapper = moved(MTPWrapper(get_peft_model(model, lora), H)).eval()
    if read == "as saved":
        wrapper.save_pretrained(tmp_path / "adapters")
        wrapper = MTPWrapper.from_pretrained(tmp_path / "adapters").eval()
    before = {name: tensor.clone() for name, tensor in wrapper.state_dict().items()}
    assert any("lora_" in name for name in before)
    export_base(wrapper, tmp_path / "base")
    assert "adapter_config.json" not in os.listdir(tmp_path / "base")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert not any("lora" in name or "base_layer" in name for name in alone.state_dict())
    torch.testing.assert_close(alone(TOKENS).logits, wrapper(TOKENS).logits)
    after = wrapper.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def prompted() -> MTPWrapper:
    from peft import PromptTuningConfig, get_peft_model

    return MTPWrapper(get_peft_model(wrap().causal, PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)), H)


REFUSED = {
    "layers as Medusa": (
        export_medusa,
        lambda: wrap(kind="layer"),
        "has 'layer' heads with horizon 4; expected 'resid",
    ),
    "one head as Medusa": (export_medusa, lambda: wrap(horizon=1), "has 'residual' heads with horizon 1; expected"),
    "no heads as Medusa": (export_medusa, lambda: wrap(kind="teacher_forcing"), "has 'teacher_forcing' heads"),
    "a bias": (export_medusa, lambda: wrap("phi"), "logits have a bias; expected neither"),
    "a softcap": (
        export_medusa,
        lambda: wrap("gemma2", head_dim=8, final_logit_softcapping=3.0),
        r"logits have a softcap of 3\.0; expected neither",
    ),
    "heads of one": (export_heads, lambda: wrap(horizon=1), "has 'residual' heads with horizon 1, which have no param"),
    "heads without parameters": (export_heads, lambda: wrap(kind="teacher_forcing"), "has 'teacher_forcing' heads"),
    "prompts in a base": (export_base, prompted, "with adapters that can't be merged into weights; expected LoRA"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_folder_can_not_hold_is_refused_by_name(what, tmp_path):
    export, make, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        export(make(), tmp_path / "new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("export", [export_base, export_medusa])
def test_a_folder_with_a_model_is_left_alone(export, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a model already"):
        export(wrap(), tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]
