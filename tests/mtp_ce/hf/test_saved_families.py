"""Models of every family are saved, loaded and resumed without a parameter left out, and do what docs/heads.md says.

The files of mixtures hold one tensor per expert and those of vision-language models other names than their modules;
hybrids hold convolutions and states; adapters are files of their own. Each case is the smallest model of its class.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, TrainingArguments

from mtp_ce import MTPWrapper

# The suite of a GPU machine may be without them.
for package in ("accelerate", "peft"):
    pytest.importorskip(package)

from peft import IA3Config, LoHaConfig, LoraConfig, VBLoRAConfig, get_peft_model  # noqa: E402

from mtp_ce import MTPTrainer  # noqa: E402
from mtp_ce.decoding.speculative import generate_speculatively  # noqa: E402

V = 64
TEXT: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": None,
    "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
TWO = {"num_hidden_layers": 2}
MIXTURE = {**TEXT, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "num_experts": 2, "num_local_experts": 2}
ROUTED = {**MIXTURE, **TWO, "first_k_dense_replace": 1, "n_routed_experts": 2, "n_group": 1, "topk_group": 1}
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 8,
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
QWEN_TEXT = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
QWEN_TOWER = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
}  # fmt: skip
QWEN_TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}


def seeing(text: dict[str, Any], tower: dict[str, Any], **config: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": tower, **config}


# Class and configuration.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama", TEXT),
    "tied": ("LlamaForCausalLM", "llama", {**TEXT, "tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", "mixtral", MIXTURE),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe", MIXTURE),
    "glm4_moe": ("Glm4MoeForCausalLM", "glm4_moe", ROUTED),
    "qwen3_next": ("Qwen3NextForCausalLM", "qwen3_next", {**MIXTURE, **TWO, **DELTA}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "deepseek_v3", {**ROUTED, **LATENT}),
    "gpt_oss": ("GptOssForCausalLM", "gpt_oss", {**MIXTURE, "layer_types": ["full_attention"]}),
    "jamba": ("JambaForCausalLM", "jamba", {**MIXTURE, **TWO, **MAMBA}),
    "llava": (
        "LlavaForConditionalGeneration", "llava",
        seeing({"model_type": "llama", **TEXT}, {"model_type": "clip_vision_model", **TOWER}, image_token_index=3),
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration", "mistral3",
        seeing({"model_type": "mistral", **TEXT}, {"model_type": "pixtral", **TOWER}, image_token_index=3),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl",
        seeing(QWEN_TEXT, {**QWEN_TOWER, "fullatt_block_indexes": [0], "window_size": 16}, **QWEN_TOKENS),
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration", "gemma3",
        seeing(TEXT, TOWER, image_token_index=3, boi_token_index=4, eoi_token_index=5, mm_tokens_per_image=4),
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration", "qwen3_vl",
        seeing(
            QWEN_TEXT, {**QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}, **QWEN_TOKENS
        ),
    ),
}  # fmt: skip


class Adapters(NamedTuple):
    """Adapters of a family's model: their configuration, and the names under which they are added."""

    family: str
    config: Callable[..., Any] = LoraConfig
    options: Any = MappingProxyType({})
    names: tuple[str, ...] = ("default",)
    inserted: bool = False  # into the model itself, by transformers

    def put_on(self, base: Any) -> Any:
        ranks = {} if self.config is IA3Config else {"r": 2}
        modules = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        options = {**ranks, **modules, **self.options}
        torch.manual_seed(5)
        if self.inserted:
            try:
                base.add_adapter(self.config(**options))
            except ValueError as error:
                pytest.skip(f"transformers inserts no adapters with this PEFT: {error}")
            return base
        model = get_peft_model(base, self.config(**options), self.names[0])
        for name in self.names[1:]:
            model.add_adapter(name, self.config(**options))
        return model


BANK = {"num_vectors": 8, "vector_length": 8, "topk": 2}
ADAPTERS = {
    "lora": Adapters("llama"),
    "lora, tied": Adapters("tied"),
    "whole layers": Adapters("llama", options={"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a whole output layer, tied": Adapters("tied", options={"modules_to_save": ["lm_head"]}),
    "whole embeddings, tied": Adapters("tied", options={"modules_to_save": ["embed_tokens"]}),
    "experts": Adapters("mixtral", options={"target_parameters": ["mlp.experts.gate_up_proj"]}),
    "a tower": Adapters("llava"),
    "two": Adapters("llama", names=("default", "other")),
    "a name of its own": Adapters("llama", names=("mine",)),
    "inserted by transformers": Adapters("llama", options={"modules_to_save": ["lm_head"]}, inserted=True),
    "whole layers, tied": Adapters("tied", options={"modules_to_save": ["embed_tokens", "lm_head"]}),
    "whole embeddings, kept tied": Adapters(
        "tied", options={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "dora": Adapters("llama", options={"use_dora": True}),
    "pissa": Adapters("llama", options={"init_lora_weights": "pissa"}),
    "some tokens": Adapters("tied", options={"trainable_token_indices": [3, 4]}),
    "no task": Adapters("llama", options={"task_type": None}),
    "ia3": Adapters("llama", IA3Config, {"feedforward_modules": []}),
    "loha": Adapters("llama", LoHaConfig),
    "a vector bank": Adapters("llama", VBLoRAConfig, BANK),
    "inserted, a mixture": Adapters("mixtral", inserted=True),
    "lora, gpt_oss": Adapters("gpt_oss"),
    "lora, gemma3": Adapters("gemma3"),
}
# The heads are "residual", but for these: layers of a mixture, of a vision-language model, of a hybrid.
HEADS = {"qwen3_moe": "sequential", "glm4_moe": "layer", "gemma3": "sequential", "jamba": "layer"}

DRAWN = torch.randint(7, V, (4, 10), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": row, "labels": row} for row in DRAWN]


def build(family: str, seed: int = 0, **options: Any) -> Any:
    """A tiny model of a family, no parameter of which has the value that it is initialised with."""
    name, kind, config = FAMILIES[family]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, name)(AutoConfig.for_model(kind, **{**config, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def wrap(case: str, folder: Path, seed: int = 0) -> MTPWrapper:
    """A wrapper; of adapters the base is always the same, and the seed is that of the adapters."""
    adapters = ADAPTERS.get(case)
    if adapters is None:
        return MTPWrapper(build(case, seed), 3, heads=HEADS.get(case, "residual"))
    base = folder / "base"
    if not base.exists():
        build(adapters.family).save_pretrained(base)
    wrapper = MTPWrapper(adapters.put_on(getattr(transformers, FAMILIES[adapters.family][0]).from_pretrained(base)), 3)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * seed)
    return wrapper


def train(wrapper: MTPWrapper, folder: Path, resume: Any = None) -> MTPTrainer:
    """Train for two steps, with a checkpoint after each; or the second of them."""
    settings = TrainingArguments(
        str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        use_cpu=True, disable_tqdm=True, seed=0, logging_strategy="no",
    )  # fmt: skip
    trainer = MTPTrainer(model=wrapper, args=settings, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def differing(one: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return [name for name, x in ours.items() if not torch.equal(x, theirs[name])]


def loss(wrapper: MTPWrapper) -> Tensor:
    with torch.no_grad():
        return wrapper.eval()(DRAWN, labels=DRAWN).loss


@pytest.mark.parametrize("case", [*FAMILIES, *ADAPTERS])
def test_a_saved_model_resumes_and_loads_bit_for_bit(case, tmp_path):
    """Resumed in a wrapper of other values, as the best one at the end, and loaded with and without the heads."""
    whole = train(wrap(case, tmp_path), tmp_path / "whole").model
    first, last = (tmp_path / "whole" / f"checkpoint-{step}" for step in (1, 2))
    other = wrap(case, tmp_path, seed=7)
    before = differing(whole, other)
    assert len(before) > (4 if case in FAMILIES else 3)
    resumed = train(other, tmp_path / "resumed", first)
    assert differing(whole, resumed.model) == []

    resumed.state.best_model_checkpoint = str(first)
    resumed._load_best_model()
    best = MTPWrapper.from_pretrained(first)
    if case in FAMILIES:
        assert differing(best, resumed.model) == []
    assert torch.equal(loss(best), loss(resumed.model))

    again = MTPWrapper.from_pretrained(last)
    assert type(again.causal) is type(whole.causal)
    assert torch.equal(loss(again), loss(whole))
    assert not torch.equal(loss(again), loss(best))
    if case in FAMILIES:
        alone = getattr(transformers, FAMILIES[case][0]).from_pretrained(last).eval()
        with torch.no_grad():
            assert torch.equal(alone(DRAWN).logits, whole(DRAWN).logits)
    elif not ADAPTERS[case].inserted:
        assert differing(again, whole) == []

        def trained(wrapper: MTPWrapper) -> set[str]:
            return {name for name, x in wrapper.named_parameters() if x.requires_grad}

        assert trained(again) == trained(whole)


# The rows of the table of families in docs/heads.md.
NAMES = {
    "Llama": "llama", "Llama, tied embeddings": "tied", "Mixtral": "mixtral", "Qwen3-MoE": "qwen3_moe",
    "GLM-4-MoE": "glm4_moe", "DeepSeek-V3": "deepseek_v3", "gpt-oss": "gpt_oss", "Qwen3-Next, hybrid": "qwen3_next",
    "Jamba, hybrid": "jamba", "LLaVA": "llava", "Mistral 3": "mistral3", "Qwen2.5-VL": "qwen2_5_vl",
    "Gemma 3": "gemma3", "Qwen3-VL": "qwen3_vl",
}  # fmt: skip


def with_images(family: str) -> dict[str, Tensor]:
    """Two rows, each with an image near its beginning, as the family's processor makes them."""
    torch.manual_seed(0)
    tokens = DRAWN[:2].clone()
    if family.startswith("qwen"):
        tokens[:, 2], tokens[:, 3], tokens[:, 4] = 5, 3, 6
        pixels = {"pixel_values": torch.randn(8, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)}
        return {"input_ids": tokens, **pixels, "mm_token_type_ids": (tokens == 3).int()}
    tokens[:, 2 : 3 if family == "mistral3" else 6] = 3
    further = {
        "mistral3": {"image_sizes": torch.tensor([[16, 16]] * 2)}, "gemma3": {"token_type_ids": (tokens == 3).long()}
    }  # fmt: skip
    return {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 16, 16), **further.get(family, {})}


def check_gradients(wrapper: MTPWrapper, names: str) -> None:
    """The loss is finite, and every trained parameter whose name has `names` in it takes part in it."""
    result = wrapper(DRAWN, labels=DRAWN).loss
    result.backward()
    assert result.isfinite()
    trained = [p for name, p in wrapper.named_parameters() if names in name and p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


def heads_of_layers(family: str) -> None:
    for kind in ("layer", "sequential"):
        check_gradients(MTPWrapper(build(family), 2, heads=kind), "heads.")


def lora(family: str) -> None:
    adapted = get_peft_model(build(family), LoraConfig(r=2, target_modules="all-linear", exclude_modules=".*vision.*"))
    check_gradients(MTPWrapper(adapted, 2), "self_attn.o_proj.lora_A")


def images(family: str) -> None:
    """One head has the model's own loss, several reach the tower, and the text is that of `generate`."""
    model, inputs = build(family).eval(), with_images(family)
    labels = inputs["input_ids"].clone()
    labels[:, :6] = -100
    with torch.no_grad():
        own, blind = model(**inputs, labels=labels).loss, model(inputs["input_ids"], labels=labels).loss
        one = MTPWrapper(model, 1, heads="none").eval()(**inputs, labels=labels).loss
    torch.testing.assert_close(one, own, rtol=1e-5, atol=0)
    assert abs(own - blind) > 1e-4
    MTPWrapper(model, 3)(**inputs, labels=labels).loss.backward()
    tower = [p for name, p in model.named_parameters() if "visual" in name or "vision" in name]
    assert any(p.grad is not None and p.grad.any() for p in tower)
    speculative(family, **inputs)


def speculative(family: str, **inputs: Tensor) -> None:
    inputs = inputs or {"input_ids": DRAWN[:2, :6]}
    model, length = build(family).eval(), {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    text = generate_speculatively(MTPWrapper(model, 3).eval(), inputs.pop("input_ids"), **inputs, **length).sequences
    assert torch.equal(text, model.generate(text[:, :-8], **inputs, **length))


COLUMNS = {
    "trains, resumes, loads": lambda family: None,  # the test above
    "heads of layers": heads_of_layers,
    "LoRA": lora,
    "images": images,
    "`speculative=True`": speculative,
}


def test_the_page_has_every_family_and_column(page_table):
    rows, columns, _ = map(set, zip(*page_table("families"), strict=True))
    assert rows == set(NAMES)
    assert set(NAMES.values()) == set(FAMILIES)
    assert columns == set(COLUMNS)


@pytest.mark.page_table("families")
def test_the_page_says_what_works_with_what(row, column, cell):
    """ "yes" runs; "no" is refused with the words that follow it; an empty cell has nothing to run."""
    family, run = NAMES[row], COLUMNS[column]
    if cell == "yes":
        run(family)
        return
    if not cell:
        assert column == "images"
        assert not hasattr(build(family).config, "vision_config")
        return
    verdict, _, words = cell.partition(": ")
    assert verdict == "no"
    with pytest.raises((TypeError, ValueError), match=words):
        run(family)
