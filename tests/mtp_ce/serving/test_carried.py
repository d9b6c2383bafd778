"""The MTP module of a checkpoint, which transformers does not load, is in every folder that is saved of its model.

One tiny model of every class of transformers that ignores such tensors, and of one for which MiMo's code is replaced by
Qwen2's. Its folder has random tensors under the family's own names, of several dtypes, and the configuration's key.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, TrainingArguments

from mtp_ce import MTPWrapper
from mtp_ce.serving.base import export_base
from mtp_ce.serving.carried import promise_none

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
    "linear_head_dim": 8, "linear_num_heads": 2, "mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 4,
    "n_groups": 1,
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
    Family("MiMoV2FlashForCausalLM", "mimo_v2_flash", "model.mtp.layers.0.", {"num_key_value_heads": 1}),
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
    Family("Glm5NextForConditionalGeneration", "glm5_next", INSIDE, {"qk_rope_head_dim": 0}),
    Family("GraniteDoclingForConditionalGeneration", "granite_docling", "mtp."),
    Family("MistralLarge4ForConditionalGeneration", "mistral_large4", "mtp_dspark.", LATENT),
    Family("Step3p7ForConditionalGeneration", "step3p7", LAYERED),
    Family("Qwen3_5ForConditionalGeneration", "qwen3_5", "mtp.", DELTA, HIDDEN),
)
FAMILIES = tuple(family for family in FAMILIES if hasattr(transformers, family.name))  # of this version
BY_TYPE = {family.model_type: family for family in FAMILIES}
# Of a model that transcribes speech, which takes no text alone.
OTHERS = {"nemotron3_5_transcribe"}


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


def source_of(family: Family, folder: Path, shard: str | None = None) -> dict[str, Tensor]:
    """Write a checkpoint with an MTP module; return the module."""
    tiny(family).save_pretrained(folder)
    extra = module(family)
    file = folder / "model.safetensors"
    if shard is None:
        save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    else:
        file.rename(folder / "model-00001-of-00002.safetensors")
        save_file(extra, folder / shard)
        weight_map = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)[family.key] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return extra


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder as transformers and serving engines find them, its index checked against the files."""
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


def quiet(make: Any, *arguments: Any, **options: Any) -> Any:
    """What a call returns, its warnings ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments, **options)


def wrapped(family: Family, folder: Path) -> MTPWrapper:
    wrapper: MTPWrapper = quiet(MTPWrapper, loaded(family, folder), 2)
    return wrapper


def step(wrapper: MTPWrapper) -> None:
    tokens = torch.arange(20, 28)[None]
    wrapper(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for x in wrapper.parameters():
            if x.grad is not None:
                x -= 0.01 * x.grad


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_family_keeps_its_module(family, tmp_path):
    """Wrapped, trained, saved and loaded: all names of the source are there, and the model is the same."""
    extra = source_of(family, tmp_path / "source")
    with pytest.warns(UserWarning, match=f"has an MTP module of {len(extra)} tensors"):
        wrapper = MTPWrapper(loaded(family, tmp_path / "source"), 2)
    step(wrapper)
    wrapper.save_pretrained(tmp_path / "saved")
    assert_carried(tmp_path / "saved", extra, tmp_path / "source", family)
    if family.prefix.startswith("mtp"):  # which transformers ignores by name, wherever the layers end
        return
    again = quiet(MTPWrapper.from_pretrained, tmp_path / "saved")
    assert again.carried.names == tuple(sorted(extra))
    assert all(torch.equal(x, y) for x, y in zip(wrapper.parameters(), again.parameters(), strict=True))


def test_the_table_has_every_family_that_ignores_a_module():
    """Of the installed transformers: a new version may bring names that are not recognised."""
    ignored = re.compile(r"_keys_to_ignore_on_load_unexpected = ([\[{].*?[\]}])\n", re.DOTALL)
    found = {
        path.parent.name
        for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
        for patterns in ignored.findall(path.read_text(encoding="utf-8"))
        if re.search(r"mtp|nextn|layers\\\.\(?\d", patterns)
    }
    assert {"deepseek_v3", "qwen3_next"} <= found
    assert found <= OTHERS | {family.model_type.removesuffix("_text") for family in FAMILIES}


GLM, QWEN = BY_TYPE["glm4_moe"], BY_TYPE["qwen3_next"]


def index_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return content


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_of_any_number_and_name_come_with_one_index(tmp_path):
    """The source's module in a file of another name; saved in parts, as a whole, in parts, all into one folder."""
    extra = source_of(GLM, tmp_path / "source", shard="mtp.safetensors")
    wrapper = wrapped(GLM, tmp_path / "source")
    # As of a save before this one, without a module.
    wrapper.model.save_pretrained(tmp_path / "saved", max_shard_size="8KB")
    for size in ("50GB", "8KB", "50GB", "8KB", "4KB"):
        wrapper.save_pretrained(tmp_path / "saved", max_shard_size=size)
        saved = tensors_of(tmp_path / "saved")
        assert set(saved) == set(load_file(tmp_path / "source" / "model-00001-of-00002.safetensors")) | set(extra)
        assert len(set(index_of(tmp_path / "saved")["weight_map"].values())) == 2 or size != "50GB"
        assert not list((tmp_path / "saved").glob("*.part"))
        model = loaded(GLM, tmp_path / "saved")
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), wrapper.model.parameters(), strict=True))


@pytest.mark.parametrize("shard", [None, "mtp.safetensors", "model-00002-of-00002.safetensors"])
def test_a_save_over_the_source_keeps_its_module(shard, tmp_path):
    """transformers deletes the shards that it does not write, those with the module among them."""
    extra = source_of(GLM, tmp_path, shard)
    wrapper = wrapped(GLM, tmp_path)
    for _ in range(2):
        wrapper.save_pretrained(tmp_path)
        assert {name: x.tolist() for name, x in module(GLM).items()}.keys() <= tensors_of(tmp_path).keys()
    saved = tensors_of(tmp_path)
    assert all(torch.equal(saved[name].view(torch.uint8), x.view(torch.uint8)) for name, x in extra.items())


@pytest.mark.parametrize("family", [GLM, QWEN, BY_TYPE["qwen3_5"]], ids=lambda family: family.model_type)
def test_without_the_source_a_save_is_refused_before_it_writes(family, tmp_path):
    source = tmp_path / "source"
    extra = source_of(family, source)
    wrapper = wrapped(family, source)
    source.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=f"^{source} can't be found .* the {len(extra)} tensors") as refused:
        wrapper.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    # The advice of the message, one after the other.
    wrapper.causal.name_or_path = str(tmp_path / "moved")
    wrapper.save_pretrained(tmp_path / "saved")
    assert_carried(tmp_path / "saved", extra, tmp_path / "moved", family)
    wrapper.causal.name_or_path = str(source)
    advice = re.search(r"no module: (wrapper\S+ = 0) drops it", str(refused.value))
    assert advice
    exec(advice[1], {"wrapper": wrapper})
    wrapper.save_pretrained(tmp_path / "saved")  # in the place of the one above, whose index goes
    assert not set(extra) & set(tensors_of(tmp_path / "saved"))
    config = config_of(tmp_path / "saved")
    key = NEXTN if family is QWEN else family.key
    assert config.get("text_config", config)[key] == 0


def test_a_source_that_is_gone_when_the_model_is_wrapped_is_said_then(tmp_path):
    source_of(GLM, tmp_path / "source")
    model = loaded(GLM, tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    with pytest.warns(UserWarning, match="Until then save_pretrained is refused"):
        wrapper = MTPWrapper(model, 2)
    with pytest.raises(FileNotFoundError, match="can't be found"):
        wrapper.save_pretrained(tmp_path / "saved")


def test_a_module_that_the_configuration_drops_is_said_and_left_out(tmp_path):
    extra = source_of(GLM, tmp_path / "source")
    with pytest.warns(UserWarning, match="leaves it out"):
        wrapper = MTPWrapper(loaded(GLM, tmp_path / "source", num_nextn_predict_layers=0), 2)
    wrapper.save_pretrained(tmp_path / "saved")
    assert not set(extra) & set(tensors_of(tmp_path / "saved"))
    assert config_of(tmp_path / "saved")[NEXTN] == 0


def promises(family: Family) -> bool:
    """Whether the class does by default."""
    return any(getattr(CONFIG_MAPPING[family.model_type], key, 0) for key in (NEXTN, "num_mtp_layers"))


def test_a_module_behind_other_layers_is_refused(tmp_path):
    source_of(GLM, tmp_path / "source")
    wrapper = quiet(MTPWrapper, loaded(GLM, tmp_path / "source", num_hidden_layers=1), 2)
    with pytest.raises(ValueError, match=r"behind 2 layers .*, and the model has 1"):
        wrapper.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("family", [family for family in FAMILIES if promises(family)], ids=lambda x: x.model_type)
def test_no_configuration_promises_a_module_that_is_not_there(family, tmp_path):
    """Some classes promise one by default, of a model that was built, too."""
    wrapper = MTPWrapper(tiny(family), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper.save_pretrained(tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path).get_text_config(), family.key) == 0
    assert getattr(wrapper.config, family.key) == 1
    promise_none(wrapper.config)  # as for a critic
    assert getattr(wrapper.config, family.key) == 0


def test_a_source_that_promises_what_it_lacks_is_saved_without_the_promise(tmp_path):
    tiny(GLM).save_pretrained(tmp_path / "source")
    assert config_of(tmp_path / "source")[NEXTN] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MTPWrapper(loaded(GLM, tmp_path / "source"), 2).save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved") == {**config_of(tmp_path / "source"), NEXTN: 0}


def test_a_configuration_with_a_path_is_no_loaded_model(tmp_path):
    """from_config keeps the path of the configuration; the module belongs to other weights."""
    extra = source_of(GLM, tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "source"))
    MTPWrapper(model, 2).save_pretrained(tmp_path / "saved")
    assert not set(extra) & set(tensors_of(tmp_path / "saved"))
    assert config_of(tmp_path / "saved")[NEXTN] == 0


def test_a_source_without_a_module_is_saved_as_transformers_saves_it(tmp_path):
    """A Llama, and a Qwen3-Next without the module that its class would ignore."""
    for family in (Family("LlamaForCausalLM", "llama", ""), QWEN):
        source, plain, saved = (tmp_path / f"{family.model_type}-{name}" for name in ("source", "plain", "saved"))
        tiny(family).save_pretrained(source)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapper = MTPWrapper(loaded(family, source), 2)
            wrapper.save_pretrained(saved)
        loaded(family, source).save_pretrained(plain)
        theirs, ours = files_of(plain), files_of(saved)
        assert {name: ours[name] for name in theirs} == theirs
        assert ours.keys() - theirs.keys() == {"mtp_heads.json", "mtp_heads.safetensors"}


def test_a_module_behind_a_trained_trunk_is_marked_as_stale(tmp_path):
    """And stays so, whatever is trained afterwards; a frozen trunk leaves it as it was."""
    source_of(GLM, tmp_path / "source")
    for trunk, source, saved, stale in (
        ("frozen", "source", "frozen", False),
        ("detached", "source", "detached", False),
        ("joint", "source", "joint", True),
        ("frozen", "joint", "twice", True),
    ):
        with pytest.warns(UserWarning, match="has an MTP module") as warned:
            wrapper = MTPWrapper(loaded(GLM, tmp_path / source), 2, trunk=trunk)
        assert any("stale" in str(warning.message) for warning in warned) == ("joint" in (trunk, source))
        wrapper.save_pretrained(tmp_path / saved)
        export_base(wrapper, tmp_path / f"{saved}-base")
        for folder in (saved, f"{saved}-base"):
            assert (index_of(tmp_path / folder)["metadata"].get("mtp_module") == "stale") == stale, folder


def test_adapters_leave_the_module_with_the_base_and_an_export_carries_it(tmp_path):
    """Adapters are saved without the model; merged, they are a trained trunk."""
    peft = pytest.importorskip("peft")
    extra = source_of(GLM, tmp_path / "source")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    for inserted in (False, True):
        model, folder = loaded(GLM, tmp_path / "source"), tmp_path / f"adapters-{inserted}"
        if inserted:
            model.add_adapter(lora)
        wrapper = quiet(MTPWrapper, model if inserted else peft.get_peft_model(model, lora), 2, trunk="detached")
        wrapper.save_pretrained(folder)
        assert not list(folder.glob("model*"))
        export_base(wrapper, tmp_path / f"base-{inserted}")
        assert_carried(tmp_path / f"base-{inserted}", extra, tmp_path / "source", GLM)
        assert index_of(tmp_path / f"base-{inserted}")["metadata"]["mtp_module"] == "stale"
    again = quiet(MTPWrapper.from_pretrained, tmp_path / "adapters-False")
    export_base(again, tmp_path / "again")
    assert_carried(tmp_path / "again", extra, tmp_path / "source", GLM)


def test_checkpoints_of_a_training_have_the_module_and_resume(tmp_path):
    pytest.importorskip("accelerate")
    from mtp_ce import MTPTrainer

    family, extra = GLM, source_of(GLM, tmp_path / "source")
    rows = [{"input_ids": list(range(20, 28)), "labels": list(range(20, 28))}] * 2

    def trainer(steps: int) -> Any:
        arguments = TrainingArguments(
            tmp_path / "run", max_steps=steps, save_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        torch.manual_seed(0)
        return MTPTrainer(model=wrapped(family, tmp_path / "source"), args=arguments, train_dataset=rows)

    trainer(1).train()
    assert_carried(tmp_path / "run" / "checkpoint-1", extra, tmp_path / "source", family)
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=True)
    assert_carried(tmp_path / "run" / "checkpoint-2", extra, tmp_path / "source", family)
    resumed.save_model(tmp_path / "saved")
    assert_carried(tmp_path / "saved", extra, tmp_path / "source", family)


def test_transformers_drafts_with_the_module_that_was_carried_over(tmp_path):
    """generate(use_mtp=True) raises where a tensor of it is missing; the layer of the module is the model's last."""
    source = tmp_path / "source"
    tiny(GLM).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    last = f"model.layers.{LAYERS - 1}."
    extra = {LAYERED + name.removeprefix(last): x + 0.1 for name, x in tensors.items() if name.startswith(last)}
    extra |= {f"{LAYERED}{name}.weight": torch.ones(D) for name in ("enorm", "hnorm", "shared_head.norm")}
    extra[f"{LAYERED}eh_proj.weight"] = torch.randn(D, 2 * D)
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    wrapped(GLM, source).save_pretrained(tmp_path / "saved")

    def text(folder: Path, **options: Any) -> Tensor:
        model = loaded(GLM, folder)
        # transformers knows the numbers of published models alone.
        model._keys_to_ignore_on_load_unexpected = {re.escape(LAYERED)}
        tokens: Tensor = model.generate(
            torch.arange(20, 26)[None], max_new_tokens=6, do_sample=False, eos_token_id=None, **options
        )
        return tokens

    for folder in (source, tmp_path / "saved"):
        assert torch.equal(text(folder), text(folder, use_mtp=True))
    (tmp_path / "saved" / "model-00001-of-00002.safetensors").rename(tmp_path / "saved" / "model.safetensors")
    with pytest.raises(RuntimeError, match="are missing"):
        text(tmp_path / "saved", use_mtp=True)


def test_a_subfolder_or_a_cache_of_the_hub_is_where_the_module_is_looked_for(tmp_path):
    """from_pretrained of the wrapper knows the options; transformers keeps them nowhere."""
    extra = source_of(GLM, tmp_path / "source")
    hub = tmp_path / "models--owner--model"
    wrapped(GLM, tmp_path / "source").save_pretrained(hub / "snapshots" / "1234")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("1234")
    for name, options in (
        (hub / "snapshots", {"subfolder": "1234"}),
        ("owner/model", {"cache_dir": tmp_path, "local_files_only": True}),
    ):
        again = quiet(MTPWrapper.from_pretrained, name, **options)
        again.save_pretrained(tmp_path / "saved")
        assert_carried(tmp_path / "saved", extra, tmp_path / "source", GLM)
        shutil.rmtree(tmp_path / "saved")


def test_distributed_checkpoints_and_empty_states_hold_no_module(tmp_path):
    """The first are refused; the second are DeepSpeed's, whose tensors are in files of its own."""
    source_of(GLM, tmp_path / "source")
    wrapper = wrapped(GLM, tmp_path / "source")
    with pytest.raises(ValueError, match="distributed_checkpoint is True"):
        wrapper.save_pretrained(tmp_path / "saved", distributed_checkpoint=True)
    wrapper.save_pretrained(tmp_path / "empty", state_dict={})
    assert not list((tmp_path / "empty").glob("*.safetensors*"))
    assert config_of(tmp_path / "empty")[NEXTN] == 0
    wrapper.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").iterdir())
