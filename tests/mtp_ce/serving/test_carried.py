"""The MTP module of a checkpoint, which transformers does not load, is in every folder that is saved of its model.

One tiny model of every class of transformers that ignores such tensors, and of one for which MiMo's code is replaced by
Qwen2's. Its folder has random tensors under the family's own names, of several dtypes, and the configuration's key.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, TrainingArguments

from mtp_ce import MTPWrapper
from mtp_ce.serving.base import export_base

V, D, LAYERS = 64, 16, 2
TINY: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False, "sliding_window": 4, "conv_kernel": 2,
    # mixtures
    "moe_intermediate_size": 8, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "num_experts": 2,
    "num_local_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2, "num_shared_experts": 1, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "shared_expert_intermediate_size": 8,
    "expert_ffn_hidden_size": 8, "ffn_hidden_size": 16, "zero_expert_num": 1,
    # latent and sparse attention
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "index_kpool": 4,
    # linear attention
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1,
    # towers
    "num_heads": 2, "depth": 1, "out_hidden_size": D, "patch_size": 4, "image_size": 16, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
DELTA = {"layer_types": ["linear_attention", "full_attention"]}
LATENT = {"head_dim": 4}
ROTARY = {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
# Names of modules as checkpoints have them: behind the layers of the model, or under a name of their own.
LAYERED = f"model.layers.{LAYERS}."
INSIDE = f"model.language_model.layers.{LAYERS}."
NEXTN, HIDDEN = "num_nextn_predict_layers", "mtp_num_hidden_layers"


class Family(NamedTuple):
    """A class, its configuration beside TINY, the prefix of its MTP module, and the key that counts the modules."""

    name: str
    model_type: str
    prefix: str
    config: dict[str, Any] = {}  # noqa: RUF012
    key: str = NEXTN


FAMILIES = (
    Family("DeepseekV3ForCausalLM", "deepseek_v3", LAYERED, LATENT),
    Family("DeepseekV32ForCausalLM", "deepseek_v32", LAYERED, LATENT),
    Family("DeepseekV4ForCausalLM", "deepseek_v4", "mtp.0."),
    Family("Glm4MoeForCausalLM", "glm4_moe", LAYERED),
    Family("Glm4MoeLiteForCausalLM", "glm4_moe_lite", LAYERED, LATENT),
    Family("GlmMoeDsaForCausalLM", "glm_moe_dsa", LAYERED, LATENT),
    Family("BailingHybridForCausalLM", "bailing_hybrid", LAYERED),
    Family("HYV3ForCausalLM", "hy_v3", LAYERED),
    Family("HYV4ForCausalLM", "hy_v4", "model.mtp_layers.0."),
    Family("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", "model.mtp_block.0."),
    Family("ExaoneMoeForCausalLM", "exaone_moe", "mtp."),
    Family("LongcatFlashForCausalLM", "longcat_flash", "model.mtp.layers.0.", LATENT),
    Family("MellumForCausalLM", "mellum", "mtp."),
    Family("MiMoV2FlashForCausalLM", "mimo_v2_flash", "model.mtp.layers.0."),
    Family("NemotronHForCausalLM", "nemotron_h", "mtp.layers.0."),
    Family("OlmoHybridForCausalLM", "olmo_hybrid", "mtp."),
    Family("Qwen2ForCausalLM", "qwen2", "model.mtp_layers.0."),
    Family("Qwen3NextForCausalLM", "qwen3_next", "mtp.", DELTA),
    Family("Qwen3_5ForCausalLM", "qwen3_5_text", "mtp.", DELTA, HIDDEN),
    Family("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", "mtp.", DELTA, HIDDEN),
    Family("Qwen4ExpForCausalLM", "qwen4_exp_text", "mtp.", {}, HIDDEN),
    Family("InklingForCausalLM", "inkling_text", "model.mtp.layers.0.", {}, "num_mtp_layers"),
    Family("MiniMaxM3VLForCausalLM", "minimax_m3_vl_text", "mtp.", {}, "num_mtp_modules"),
    Family("Dots3NoteForCausalLM", "dots3_note_text", LAYERED),
    Family("Glm4vMoeForConditionalGeneration", "glm4v_moe", INSIDE, ROTARY),
    Family("GlmOcrForConditionalGeneration", "glm_ocr", INSIDE, ROTARY),
    Family("Exaone4_5_ForConditionalGeneration", "exaone4_5", "mtp."),
    Family("Glm5NextForConditionalGeneration", "glm5_next", INSIDE),
    Family("GraniteDoclingForConditionalGeneration", "granite_docling", "mtp."),
    Family("MistralLarge4ForConditionalGeneration", "mistral_large4", "mtp_dspark.", LATENT),
    Family("Step3p7ForConditionalGeneration", "step3p7", LAYERED),
    Family("Qwen3_5ForConditionalGeneration", "qwen3_5", "mtp.", DELTA, HIDDEN),
)
BY_TYPE = {family.model_type: family for family in FAMILIES}


def known(cls: Any, **more: Any) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    return {name: value for name, value in TINY.items() if name in names} | more


def tiny(family: Family) -> Any:
    """The smallest model of a family, with random weights."""
    cls: Any = CONFIG_MAPPING[family.model_type]
    if "text_config" not in cls.sub_configs:
        config = cls(**known(cls, **family.config))
    else:
        default, parts = cls(), {}
        for part in cls.sub_configs:
            inner = type(getattr(default, part))
            more = family.config if part == "text_config" else {}
            parts[part] = {"model_type": inner.model_type, **known(inner, **more)}
        config = cls(**parts)
    torch.manual_seed(3)
    return getattr(transformers, family.name)(config)


def module(family: Family) -> dict[str, Tensor]:
    """Tensors of an MTP module: those that mark it, those of a layer, and bits that no arithmetic keeps."""
    torch.manual_seed(4)
    names = {"eh_proj.weight": (D, 2 * D), "enorm.weight": (D,), "self_attn.q_proj.weight": (D, D)}
    names |= {
        f"mlp.experts.{i}.{part}_proj.weight": shape
        for i in range(2)
        for part, shape in (("gate", (8, D)), ("up", (8, D)), ("down", (D, 8)))
    }
    tensors = {family.prefix + name: torch.randn(shape).bfloat16() for name, shape in names.items()}
    tensors[f"{family.prefix}shared_head.norm.weight"] = torch.tensor([0x7FC1, 0x7F81]).short().view(torch.bfloat16)
    tensors[f"{family.prefix}mlp.scale"] = torch.randn(4).to(torch.float8_e4m3fn)
    return tensors


def source_of(family: Family, folder: Path, shards: str | None = None) -> dict[str, Tensor]:
    """Write a checkpoint with an MTP module; return the module."""
    tiny(family).save_pretrained(folder)
    extra = module(family)
    file = folder / "model.safetensors"
    if shards is None:
        save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    else:
        file.rename(folder / "model-00001-of-00002.safetensors")
        save_file(extra, folder / shards)
        weight_map = dict.fromkeys(extra, shards)
        weight_map |= dict.fromkeys(names_in(folder / "model-00001-of-00002.safetensors"), file.stem + "-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)[family.key] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return extra


def names_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder as transformers and serving engines find them, the index checked against the files."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        assert not index.exists()  # transformers reads the file, and engines read the index
        return load_file(whole)
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    assert files == sorted(path.name for path in folder.glob("model*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        inside = load_file(folder / file)
        assert set(inside) == {name for name, where in content["weight_map"].items() if where == file}
        tensors |= inside
    assert set(tensors) == set(content["weight_map"])
    assert content["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    return tensors


def assert_carried(folder: Path, extra: dict[str, Tensor], source: Path, family: Family) -> None:
    saved = tensors_of(folder)
    assert set(saved) == set(tensors_of(source))
    for name, x in extra.items():
        assert saved[name].dtype == x.dtype
        assert torch.equal(saved[name].view(torch.uint8), x.view(torch.uint8)), name
    config = json.loads((folder / "config.json").read_text())
    assert config.get("text_config", config)[family.key] == 1


def loaded(family: Family, folder: Path, **options: Any) -> Any:
    return getattr(transformers, family.name).from_pretrained(folder, **options)


def wrapped(family: Family, folder: Path, **options: Any) -> MTPWrapper:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MTPWrapper(loaded(family, folder), 2, **options)


def step(wrapper: MTPWrapper) -> None:
    tokens = torch.arange(20, 28)[None]
    wrapper(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for x in wrapper.parameters():
            if x.grad is not None:
                x -= 0.01 * x.grad


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_family_keeps_its_module(family, tmp_path):
    """Wrapped, trained, saved, loaded with from_pretrained and saved again: all names of the source are there."""
    extra = source_of(family, tmp_path / "source")
    with pytest.warns(UserWarning, match=f"has an MTP module of {len(extra)} tensors"):
        wrapper = MTPWrapper(loaded(family, tmp_path / "source"), 2)
    step(wrapper)
    wrapper.save_pretrained(tmp_path / "saved")
    assert_carried(tmp_path / "saved", extra, tmp_path / "source", family)
    again = MTPWrapper.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(x, y) for x, y in zip(wrapper.parameters(), again.parameters(), strict=True))
    again.save_pretrained(tmp_path / "again")
    assert_carried(tmp_path / "again", extra, tmp_path / "source", family)
