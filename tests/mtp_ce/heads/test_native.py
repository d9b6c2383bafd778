"""Native MTP modules: what engines draft with is read, trained and written back under the names it had.

Checkpoints are those of tiny random models, with the tensors of modules added as the layouts name them. The hidden
states and drafts that they must have are those of transformers' own `MtpModel`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainingArguments
from transformers.cache_utils import MtpCache
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.modeling_layers import MtpModel

from mtp_ce import MTPWrapper
from mtp_ce.decoding.speculative import generate_speculatively
from mtp_ce.heads.modules.layout import ModuleLayout
from mtp_ce.heads.modules.table import MODULE_LAYOUTS
from mtp_ce.serving.base import export_base

V, D, LAYERS = 64, 16, 2
TINY: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 0, "tie_word_embeddings": False, "initializer_range": 0.2,
    # mixtures
    "moe_intermediate_size": 8, "num_experts_per_tok": 2, "num_experts": 4, "n_routed_experts": 4,
    "num_shared_experts": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 8,
    # latent and linear attention
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
    # towers
    "num_layers": 1, "num_heads": 2, "depth": 1, "patch_size": 4, "image_size": 16,
}  # fmt: skip
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
FULL = {"layer_types": ["full_attention", "full_attention"]}


class Family(NamedTuple):
    """A class, its configuration beside TINY, the layout of its modules, and the key that counts them."""

    name: str
    layout: str
    config: dict[str, Any] = {}  # noqa: RUF012
    key: str = "num_nextn_predict_layers"
    copied: int = LAYERS - 1  # the layer of the model that the module's resembles

    @property
    def cls(self) -> Any:
        return getattr(transformers, self.name)


GLM = Family("Glm4MoeForCausalLM", "deepseek")
QWEN = Family("Qwen3_5ForCausalLM", "qwen", HYBRID, "mtp_num_hidden_layers")
DENSE_QWEN = Family("Qwen3_5ForCausalLM", "qwen", FULL, "mtp_num_hidden_layers")
MIMO = Family("Qwen2ForCausalLM", "mimo")
MELLUM = Family(
    "MellumForCausalLM",
    "qwen",
    {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "num_nextn_predict_layers": 1},
    copied=0,
)
STEP = Family("Step3p7ForConditionalGeneration", "deepseek", {"num_nextn_predict_layers": 1, "sliding_window": 4})
FAMILIES = (
    GLM,
    Family("DeepseekV3ForCausalLM", "deepseek", {"head_dim": 4}),
    Family("Qwen3NextForCausalLM", "qwen", HYBRID),
    QWEN,
    Family("Qwen3_5MoeForCausalLM", "qwen", HYBRID, "mtp_num_hidden_layers"),
    MELLUM,
    MIMO,
    # Latent attention, and a vision-language model with layers of other names in its files.
    Family("Glm4MoeLiteForCausalLM", "deepseek", {"head_dim": 4}),
    STEP,
)
# Those that transformers drafts with.
MTP_MODEL = (GLM, FAMILIES[1], MELLUM, STEP)


def named(family: Family) -> str:
    return family.cls.config_class.model_type


def configuration(family: Family) -> Any:
    cls = family.cls.config_class

    def tiny(cls: Any) -> dict[str, Any]:
        names = {field.name for field in fields(cls)}
        return {name: x for name, x in TINY.items() if name in names}

    if "text_config" not in cls.sub_configs:
        return cls(**tiny(cls) | family.config)
    parts = {name: type(getattr(cls(), name)) for name in cls.sub_configs}
    settings = {name: {"model_type": part.model_type, **tiny(part)} for name, part in parts.items()}
    settings["text_config"] |= family.config
    return cls(**settings)


def checkpoint(
    family: Family, folder: Path, modules: int = 1, copies: bool = True, dtype: Any = None
) -> dict[str, Tensor]:
    """Write a model with modules in its files; return all tensors."""
    layout = MODULE_LAYOUTS[family.layout]
    torch.manual_seed(3)
    family.cls(configuration(family)).to(dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    part = re.compile(rf"model\.layers\.{family.copied}\.(.*)")
    layer = {match[1]: x for name, x in tensors.items() if (match := part.fullmatch(name))}
    for k in range(modules):
        prefix = layout.prefix.format(k=k, layer=LAYERS + k)
        inner = prefix + layout.decoder.format(k=k)
        own = {f"{inner}{name}": x + 0.1 * torch.randn_like(x) for name, x in layer.items()}
        for name in (layout.hidden_norm, layout.token_norm, layout.output_norm):
            own[f"{prefix}{name}.weight"] = 1 + 0.3 * torch.randn(D)
        own[f"{prefix}{layout.projection}.weight"] = 0.2 * torch.randn(D, 2 * D)
        for name, whose in (layout.copies if copies else {}).items():
            own[f"{prefix}{name}.weight"] = tensors[
                "lm_head.weight" if whose == "output" else "model.embed_tokens.weight"
            ]
        tensors |= {name: x.to(dtype).clone() for name, x in own.items()}
    # transformers keeps it in fp32, as published checkpoints do.
    tensors = {name: x.float() if "e_score_correction_bias" in name else x for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)[family.key] = modules
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def loaded(family: Family, folder: Path, **options: Any) -> Any:
    model = family.cls.from_pretrained(folder, **options)
    if family.layout == "deepseek":  # transformers knows the numbers of published models alone
        model._keys_to_ignore_on_load_unexpected = {rf"layers\.[{LAYERS}-9]\."}
    return model


def native(family: Family, folder: Path, **options: Any) -> MTPWrapper:
    """The wrapper of a checkpoint; a warning would say that something of it is not trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return MTPWrapper(loaded(family, folder), heads="native", **options)


def saved(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return {name: x for file in files for name, x in load_file(folder / file).items()}


def same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x, y)


def changed(ours: dict[str, Tensor], source: dict[str, Tensor]) -> set[str]:
    """Names of tensors that differ; the names themselves are the same."""
    assert ours.keys() == source.keys()
    return {name for name, x in source.items() if not same(x, ours[name])}


def state(wrapper: MTPWrapper) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in wrapper.state_dict().items()}


def step(wrapper: MTPWrapper) -> None:
    tokens = torch.arange(20, 32)[None]
    wrapper.train()(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for x in wrapper.parameters():
            if x.grad is not None:
                x -= 0.1 * x.grad
                x.grad = None
    wrapper.eval()


def as_transformers_runs_it(layout: ModuleLayout) -> ModuleLayout:
    """`MtpModel` reads the token at position 0, and passes on the normed hidden state, in every layout."""
    return layout._replace(masks_first=False, passes_normed=True)


@pytest.mark.parametrize("family", FAMILIES, ids=named)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_modules_are_read_and_written_back_to_the_bit(family, dtype, tmp_path):
    source = checkpoint(family, tmp_path / "source", dtype=dtype)
    wrapper = native(family, tmp_path / "source")
    assert (wrapper.horizon, wrapper.kind) == (2, "native")
    wrapper.save_pretrained(tmp_path / "saved")
    assert not changed(saved(tmp_path / "saved"), source)
    config, before = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "source"))
    assert config.get("text_config", config)[family.key] == before.get("text_config", before)[family.key] == 1
    assert not (tmp_path / "saved" / "mtp_heads.safetensors").exists()
    for options in ({}, {"heads": "native"}):
        again = MTPWrapper.from_pretrained(tmp_path / "saved", **options)
        assert all(same(x, y) for x, y in zip(wrapper.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("family", "modules"), [(family, n) for family in MTP_MODEL for n in (1, 3) if n == 1 or family in MTP_MODEL[:2]]
)
def test_hidden_states_and_drafts_are_those_of_transformers(family, modules, tmp_path):
    checkpoint(family, tmp_path, modules)
    wrapper = native(family, tmp_path).eval()
    wrapper.heads.layout = as_transformers_runs_it(wrapper.heads.layout)
    causal = wrapper.causal
    theirs = MtpModel.from_pretrained(causal)
    tokens = torch.arange(5, 17)[None]
    with torch.no_grad():
        ours = wrapper.head_hidden_states(input_ids=tokens)
        cache, hidden, S = MtpCache(config=causal.config.get_mtp_config()), ours[0][:, :-modules], 12 - modules
        for k in range(modules):
            positions = torch.arange(1 + k, 1 + k + S)[None]
            hidden = theirs.forward_layer(k, hidden, positions, cache, input_ids=tokens[:, 1 + k : 1 + k + S])
            torch.testing.assert_close(ours[k + 1][:, :S], hidden)
    rounds = list(zip(drafts_of_ours(wrapper, tokens), drafts_of_theirs(causal, tokens), strict=False))
    # Near the end ours are no longer than the text may become.
    assert all(ours == theirs[: len(ours)] for ours, theirs in rounds)
    assert sum(ours == theirs for ours, theirs in rounds) >= len(rounds) - modules - 1 >= 3


def drafts_of_theirs(causal: Any, tokens: Tensor, new: int = 12) -> list[list[int]]:
    drafts, original = [], MTPCandidateGenerator.get_candidates

    def spied(self: Any, input_ids: Tensor, *arguments: Any, **options: Any) -> Any:
        candidates, logits = original(self, input_ids, *arguments, **options)
        drafts.append(candidates[0, input_ids.shape[1] :].tolist())
        return candidates, logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MTPCandidateGenerator, "get_candidates", spied)
        text = causal.generate(tokens, max_new_tokens=new, do_sample=False, use_mtp=True)
    assert torch.equal(text, causal.generate(tokens, max_new_tokens=new, do_sample=False))
    return [draft for draft in drafts if draft]


def drafts_of_ours(wrapper: MTPWrapper, tokens: Tensor, new: int = 12, **options: Any) -> list[list[int]]:
    drafts: list[list[int]] = []
    original = type(wrapper.heads).drafter

    @contextmanager
    def spied(self: Any, *arguments: Any) -> Iterator[Any]:
        with original(self, *arguments) as drafter:
            draft = drafter.draft

            def recorded(*arguments: Any) -> Any:
                found = draft(*arguments)
                drafts.append(found[0][0].tolist())
                return found

            drafter.draft = recorded
            yield drafter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(wrapper.heads), "drafter", spied)
        text = generate_speculatively(wrapper, tokens, max_new_tokens=new, do_sample=False, **options).sequences
    assert torch.equal(text, wrapper.generate(tokens, max_new_tokens=new, do_sample=False))
    return drafts


@pytest.mark.parametrize("family", [GLM, DENSE_QWEN, MIMO], ids=named)
@pytest.mark.parametrize("modules", [1, 2])
def test_speculative_text_is_the_models_own_at_any_horizon(family, modules, tmp_path):
    """One module drafts further than there are modules; of the layout "qwen" there is only one."""
    if modules > 1 and MODULE_LAYOUTS[family.layout].single:
        return
    checkpoint(family, tmp_path, modules)
    tokens = torch.arange(5, 12)[None]
    for horizon in (2, 4) if modules == 1 else (2, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the module that horizon 2 leaves as it is
            wrapper = MTPWrapper(loaded(family, tmp_path), horizon, heads="native").eval()
        assert wrapper.heads.shared == (modules == 1)
        assert max(map(len, drafts_of_ours(wrapper, tokens))) == horizon - 1
    if modules == 1:
        assert max(map(len, drafts_of_ours(wrapper, tokens, horizon=6))) == 5


@pytest.mark.parametrize("family", [GLM, QWEN, MIMO], ids=named)
def test_every_trunk_mode_trains_the_module_and_writes_it_back(family, tmp_path):
    source = checkpoint(family, tmp_path / "source")
    own = {name for name in source if name not in loaded(family, tmp_path / "source").state_dict()}
    for trunk in ("joint", "detached", "frozen"):
        wrapper = native(family, tmp_path / "source", trunk=trunk)
        module = set(wrapper.heads.stored_names)
        step(wrapper)
        wrapper.save_pretrained(tmp_path / trunk)
        different = changed(saved(tmp_path / trunk), source)
        assert bool(different - module) == (trunk == "joint")
        trained = {name for name in module if "experts" not in name and "e_score" not in name}
        copies = {name for name in module if "embed_tokens" in name or "shared_head.head" in name}
        assert trained - different <= (set() if trunk == "joint" else copies)
        assert module <= own
        index = json.loads((tmp_path / trunk / "model.safetensors.index.json").read_text())
        assert "mtp_module" not in index["metadata"]  # trained with the trunk, it is not stale
        again = MTPWrapper.from_pretrained(tmp_path / trunk)
        assert all(same(x, state(wrapper)[name]) for name, x in state(again).items())
    joint = saved(tmp_path / "joint")
    if family is GLM:  # copies follow the model's own
        assert same(joint["model.layers.2.embed_tokens.weight"], joint["model.embed_tokens.weight"])
        assert same(joint["model.layers.2.shared_head.head.weight"], joint["lm_head.weight"])


@pytest.mark.parametrize("family", [GLM, QWEN], ids=named)
def test_checkpointing_changes_no_gradient_at_several_depths(family, tmp_path):
    """One module passes on its normed output, the other the state before the norm."""
    checkpoint(family, tmp_path / "source")
    wrapper = MTPWrapper(loaded(family, tmp_path / "source"), 3, heads="native").train()
    tokens = torch.randint(2, V, (2, 9), generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, Tensor]:
        wrapper.zero_grad()
        wrapper(tokens, labels=tokens).loss.backward()
        return {name: x.grad.clone() for name, x in wrapper.named_parameters() if x.grad is not None}

    expected = gradients()
    for reentrant in (False, True):
        wrapper.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found = gradients()
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_keep_the_trained_module_beside_them(tmp_path):
    peft = pytest.importorskip("peft")
    source = checkpoint(GLM, tmp_path / "source")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapper = MTPWrapper(peft.get_peft_model(loaded(GLM, tmp_path / "source"), lora), heads="native")
    assert not any("lora" in name for name in wrapper.heads.state_dict())
    step(wrapper)
    wrapper.save_pretrained(tmp_path / "adapters")
    assert not list((tmp_path / "adapters").glob("model*"))
    for options in ({}, {"heads": "native"}):
        again = MTPWrapper.from_pretrained(tmp_path / "adapters", **options)
        assert all(same(x, state(wrapper)[name]) for name, x in state(again).items())
    export_base(again, tmp_path / "base")
    merged = saved(tmp_path / "base")
    assert merged.keys() == source.keys()
    heads = wrapper.heads.module_tensors(wrapper.causal)
    assert all(same(merged[name], x) for name, x in heads.items())
    assert changed(merged, source) >= {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(LAYERS)}


def test_modules_beyond_the_horizon_are_carried_over(tmp_path):
    """And are stale behind a trunk that was trained; what was trained with it is not."""
    source = checkpoint(GLM, tmp_path / "source", modules=2)
    with pytest.warns(UserWarning, match="has an MTP module of .* tensors that transformers does not load"):
        wrapper = MTPWrapper(loaded(GLM, tmp_path / "source"), 2, heads="native")
    step(wrapper)
    wrapper.save_pretrained(tmp_path / "saved")
    different = changed(saved(tmp_path / "saved"), source)
    assert not any(name.startswith("model.layers.3.") for name in different)
    assert any(name.startswith("model.layers.2.") for name in different)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["mtp_module"] == "stale"


ROWS = [{"input_ids": row, "labels": row} for row in ([*range(20 + i, 36 + i)] for i in range(4))]


def trainer(wrapper: MTPWrapper, folder: Path, steps: int, **options: Any) -> Any:
    pytest.importorskip("accelerate")
    from mtp_ce import MTPTrainer

    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=2e-2, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return MTPTrainer(model=wrapper, args=arguments, train_dataset=ROWS)


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapters"])
def test_a_resumed_training_is_the_uninterrupted_one(adapted, tmp_path):
    checkpoint(GLM, tmp_path / "source")

    def made() -> MTPWrapper:
        torch.manual_seed(0)
        model = loaded(GLM, tmp_path / "source")
        if adapted:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        return MTPWrapper(model, 3, heads="native")

    whole = made()
    trainer(whole, tmp_path / "run", 4, save_steps=2).train()
    resumed = made()
    trainer(resumed, tmp_path / "run", 4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(same(x, state(resumed)[name]) for name, x in state(whole).items())
    assert (tmp_path / "run" / "checkpoint-2" / "mtp_heads.safetensors").exists() == adapted


@pytest.mark.parametrize("family", [GLM, QWEN], ids=named)
def test_a_fine_tuned_model_drafts_better_with_its_own_module(family, tmp_path):
    """transformers 5.24 can't draft with Qwen3.5: there the drafts are head 1's argmax on the model's own text."""
    source = checkpoint(family, tmp_path / "source")
    wrapper = native(family, tmp_path / "source")
    before = accepted(family, wrapper)
    run = trainer(wrapper, tmp_path / "run", 60, logging_steps=10, save_strategy="no")
    run.train()
    logged = [log["ce_head_1"] for log in run.state.log_history if "ce_head_1" in log]
    assert logged[-1] < 0.5 * logged[0]
    run.save_model(tmp_path / "saved")
    assert changed(saved(tmp_path / "saved"), source)
    after = accepted(family, MTPWrapper.from_pretrained(tmp_path / "saved"))
    assert after > before + 0.5
    if family is GLM:
        assert accepted_by_transformers(loaded(GLM, tmp_path / "saved")) > accepted_by_transformers(
            loaded(GLM, tmp_path / "source")
        )


def accepted(family: Family, wrapper: MTPWrapper) -> float:
    """The fraction of positions of the model's own greedy text at which head 1 drafts the token after the next."""
    wrapper.eval()
    text = wrapper.generate(torch.tensor([ROWS[0]["input_ids"][:4]]), max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        drafts = wrapper.head_logits(input_ids=text)[1].argmax(-1)
    return float((drafts[:, 3:-2] == text[:, 5:]).float().mean())


def accepted_by_transformers(causal: Any) -> int:
    """How few forwards of the model `generate(use_mtp=True)` needs for 12 tokens, as a count of those saved."""
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    hook = causal.model.register_forward_hook(count)
    causal.generate(torch.tensor([ROWS[0]["input_ids"][:4]]), max_new_tokens=12, do_sample=False, use_mtp=True)
    hook.remove()
    return 12 - forwards


def test_a_gathered_state_is_what_is_written(tmp_path):
    """As trainers gather it from several ranks, in a file without the second name of tied weights."""
    source = checkpoint(GLM, tmp_path / "source")
    wrapper = native(GLM, tmp_path / "source")
    gathered = {name: x + 1 if x.is_floating_point() else x for name, x in state(wrapper).items()}
    wrapper.save_pretrained(tmp_path / "saved", state_dict=gathered)
    assert all(torch.equal(x, source[name] + 1) for name, x in saved(tmp_path / "saved").items())


def rewritten(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


PREFIX = f"model.layers.{LAYERS}."


FAULTS: dict[str, Any] = {
    "enorm.weight is missing": lambda x: x.pop(f"{PREFIX}enorm.weight"),
    "self_attn.k_proj.weight is missing": lambda x: x.pop(f"{PREFIX}self_attn.k_proj.weight"),
    "mlp.experts": lambda x: x.pop(f"{PREFIX}mlp.experts.1.up_proj.weight"),
    "gate.weight is not the layer's": lambda x: x.update({f"{PREFIX}gate.weight": torch.ones(2)}),
    "eh_proj.weight is [2, 2]; expected [16, 32]": lambda x: x.update({f"{PREFIX}eh_proj.weight": torch.ones(2, 2)}),
    "embed_tokens.weight differs from the model's own": lambda x: x[f"{PREFIX}embed_tokens.weight"].add_(1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_module_that_does_not_fit_is_refused_by_name(fault, tmp_path):
    checkpoint(GLM, tmp_path)
    rewritten(tmp_path, FAULTS[fault])
    start = f"{tmp_path} has an MTP module that does not fit the model: {PREFIX}{fault}"
    with pytest.raises(ValueError, match=f"^{re.escape(start)}"):
        MTPWrapper(loaded(GLM, tmp_path), heads="native")


def test_what_is_no_native_module_is_refused(tmp_path):
    checkpoint(GLM, tmp_path / "other")
    rewritten(
        tmp_path / "other", lambda x: x.update({f"{PREFIX}norm_of_hidden.weight": x.pop(f"{PREFIX}hnorm.weight")})
    )
    with pytest.raises(ValueError, match=r"has an MTP module in a layout that is not supported, model\.layers\.2\."):
        MTPWrapper(loaded(GLM, tmp_path / "other"), heads="native")
    checkpoint(GLM, tmp_path / "two", modules=2)
    with pytest.raises(ValueError, match=r"^horizon is 4 and .* has 2 MTP modules; expected at most 3"):
        MTPWrapper(loaded(GLM, tmp_path / "two"), 4, heads="native")
    model = loaded(GLM, tmp_path / "two", num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"^heads is 'native', and the model's configuration has 0 MTP modules"):
        MTPWrapper(model, heads="native")
    built = GLM.cls(model.config)
    with pytest.raises(ValueError, match=r"^Glm4MoeForCausalLM has no MTP module; heads='native' trains the one"):
        MTPWrapper(built, heads="native")
    with pytest.raises(ValueError, match=r"^horizon is None with heads='residual'; expected the number of heads"):
        MTPWrapper(built)
    with pytest.raises(ValueError, match=r"^shared is True with heads='native'"):
        MTPWrapper(loaded(GLM, tmp_path / "two"), heads="native", shared=True)
    for options in ({"heads": "residual"}, {"horizon": 2}):
        with pytest.raises(ValueError, match="expected heads='native' with any horizon, or neither"):
            MTPWrapper.from_pretrained(tmp_path / "two", **options)


def test_a_kind_of_attention_that_the_model_lacks_is_refused(tmp_path):
    family = MELLUM._replace(config={**MELLUM.config, "layer_types": ["full_attention"] * 2}, copied=1)
    checkpoint(family, tmp_path)
    with pytest.raises(
        ValueError, match=r"attention 'sliding_attention', and the model's layers have 'full_attention'"
    ):
        MTPWrapper(loaded(family, tmp_path), heads="native")
