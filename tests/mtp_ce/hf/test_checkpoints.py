"""Checkpoints that were cut short or do not fit, parameters without values, and heads on a model that is loaded."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerState,
    TrainingArguments,
)

from mtp_ce import MTPHeads, MTPWrapper

# The suite of a GPU machine may be without them.
for package in ("accelerate", "peft"):
    pytest.importorskip(package)

import peft  # noqa: E402
from peft import (  # noqa: E402
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from mtp_ce import MTPTrainer  # noqa: E402

V = 61
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
TOKENS = torch.randint(V, (4, 10), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": row, "labels": row} for row in TOKENS]
LORA = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")


def llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **config))


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))


def adapted(folder: Path, seed: int = 0) -> PeftModel:
    """Adapters drawn from a seed, on a model that is saved in `folder`."""
    if not folder.exists():
        llama().save_pretrained(folder)
    base = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    return get_peft_model(base, LORA)


def trainer(model: Any, folder: Path, steps: int = 3, **settings: Any) -> MTPTrainer:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, seed=0,
        report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no", **settings,
    )  # fmt: skip
    return MTPTrainer(model=MTPWrapper(model, 3), args=arguments, train_dataset=ROWS)


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


# --- checkpoints that were cut short


def cut_short(folder: Path, whole: Path, files: int) -> Path:
    """A checkpoint as a kill leaves it: some files, in the order in which they are written, and half of the next."""
    folder.mkdir()
    written = sorted((path for path in whole.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    for i, path in enumerate(written[: files + 1]):
        copied = folder / path.relative_to(whole)
        copied.parent.mkdir(exist_ok=True)
        data = path.read_bytes()
        copied.write_bytes(data if i < files else data[: len(data) // 2])
    return folder


@pytest.mark.parametrize("made", ["plain", "adapters"])
def test_a_training_killed_while_it_writes_a_checkpoint_is_resumed_from_the_one_before(made, tmp_path):
    """Killed at every file of the checkpoint in turn; the resumed run ends as the uninterrupted one."""

    def model(seed: int = 0) -> Any:
        return llama(seed) if made == "plain" else adapted(tmp_path / "base", seed)

    whole = trainer(model(), tmp_path / "whole")
    whole.train()
    last = tmp_path / "whole" / "checkpoint-3"
    assert max(last.iterdir(), key=lambda path: path.stat().st_mtime_ns).name == "trainer_state.json"
    files = sum(path.is_file() for path in last.rglob("*"))
    assert files > 9
    resumed = trainer(model(7), tmp_path / "killed")
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "killed" / "checkpoint-1")
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("transformers.Trainer.train", lambda _, checkpoint: asked.append(checkpoint))
        for count in range(files):
            folder = cut_short(tmp_path / "killed" / "checkpoint-2", last, count)
            with pytest.warns(UserWarning, match=r"checkpoint-2 is no complete checkpoint, and is passed over: ."):
                resumed.train(resume_from_checkpoint=True)
            with pytest.raises(ValueError, match=r"checkpoint-2 is no complete checkpoint: .*resume_from_checkpoint=T"):
                resumed.train(resume_from_checkpoint=str(folder))
            shutil.rmtree(folder)
    assert asked == [str(tmp_path / "killed" / "checkpoint-1")] * files
    cut_short(tmp_path / "killed" / "checkpoint-2", last, files - 3)
    with pytest.warns(UserWarning, match="passed over"):
        resumed.train(resume_from_checkpoint=True)
    assert same(state(whole.model), state(resumed.model))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), r"model-00002.* is damaged or missing"),
        (lambda folder: (folder / "mtp_heads.safetensors").unlink(), r"has no mtp_heads\.json and mtp_heads\.safetens"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"PK"), r"optimizer\.pt is damaged or missing"),
        (lambda folder: (folder / "trainer_state.json").write_text("[]"), r"trainer_state\.json is damaged"),
        (lambda folder: (folder / "trainer_state.json").write_text("{"), r"JSONDecodeError"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), r"neither model\.safetensors nor adapters"),
    ],
)
def test_what_a_checkpoint_lacks_is_named(damage, words, tmp_path):
    """Of a model in several files, too, where power failed after the state was written."""
    run = trainer(llama(), tmp_path, 1)
    run.train()
    folder = tmp_path / "checkpoint-1"
    (folder / "model.safetensors").unlink()
    run.model.model.save_pretrained(folder, max_shard_size="8KB")
    trainer(llama(7), tmp_path / "other", 2).train(resume_from_checkpoint=str(folder))
    damage(folder)
    with pytest.raises(ValueError, match=rf"checkpoint-1 is no complete checkpoint: .*{words}"):
        run.train(resume_from_checkpoint=str(folder))
    with (
        pytest.warns(UserWarning, match=words),
        pytest.raises(ValueError, match=r"output_dir .* has no complete checkpoint; expected one, or resume_from_chec"),
    ):
        run.train(resume_from_checkpoint=True)


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path):
    run = trainer(llama(), tmp_path / "out", 1)
    run.model.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "nowhere"):
        with pytest.raises(
            ValueError, match=r"is no complete checkpoint: trainer_state\.json is missing.*MTPWrapper\.f"
        ):
            run.train(resume_from_checkpoint=str(folder))
    assert MTPWrapper.from_pretrained(tmp_path / "saved").horizon == 3
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        run.train(resume_from_checkpoint=True)
    run.train(resume_from_checkpoint=None)


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_of_sharded_checkpoints_only_the_state_is_checked(sharded, tmp_path, monkeypatch):
    """Their other files are FSDP's or DeepSpeed's own."""
    run, asked = trainer(llama(), tmp_path), []
    monkeypatch.setattr("transformers.Trainer.train", lambda _, checkpoint: asked.append(checkpoint))
    setattr(run, sharded, True)
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    with pytest.warns(UserWarning, match="checkpoint-11 is no complete checkpoint"):
        run.train(resume_from_checkpoint=True)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert asked == [str(tmp_path / f"checkpoint-{step}") for step in (10, 9)]


def test_a_checkpoint_without_an_optimizer_is_complete(tmp_path):
    """As save_only_model writes it."""
    trainer(llama(), tmp_path, 2, save_only_model=True).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no complete checkpoint")
        run = trainer(llama(7), tmp_path, 2, save_only_model=True)
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 2


def test_a_checkpoint_is_resumed_after_its_writing_failed(tmp_path, monkeypatch):
    """In one process: the exception leaves what a kill would."""
    killed, save = trainer(llama(), tmp_path), TrainerState.save_to_json

    def fail(self: TrainerState, path: str) -> None:
        if self.global_step == 2:
            raise KeyboardInterrupt
        save(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", fail)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    monkeypatch.undo()
    resumed, whole = trainer(llama(7), tmp_path), trainer(llama(), tmp_path / "whole")
    with pytest.warns(UserWarning, match=r"checkpoint-2 is no complete checkpoint, and is passed over: trainer_state"):
        resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert same(state(whole.model), state(resumed.model))


# --- files that do not fit


def edit(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
PART = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MISFITS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "a parameter is missing": ("plain", lambda x: x.pop("model.norm.weight"), r"model\.norm\.weight is missing$"),
    "three are missing": (
        "plain",
        lambda x: [x.pop(name) for name in sorted(x) if "mlp" in name],
        r"mlp\.down_proj\.weight is missing, and 2 more like it$",
    ),
    "one too many": ("plain", lambda x: x.update(more=torch.ones(1)), r"more is not the model's$"),
    "another shape": (
        "plain",
        lambda x: x.update({"model.norm.weight": torch.ones(15)}),
        r"model\.norm\.weight is \[15\]; expected \[16\]$",
    ),
    "an expert is missing": (
        "mixture",
        lambda x: x.pop(EXPERT),
        r"MixtralForCausalLM: tensors that are parts of one parameter are .* transformers' log",
    ),
    "an adapter is missing": (
        "adapters",
        lambda x: x.pop(PART),
        r"the model's adapter 'default': .*lora_A.* is missing$",
    ),
    "a whole layer is missing": (
        "adapters",
        lambda x: x.pop("base_model.model.lm_head.weight"),
        r"lm_head\.weight is missing$",
    ),
    "an adapter too many": ("adapters", lambda x: x.update(more=torch.ones(1)), r"more is not the model's$"),
    "an adapter of another rank": (
        "adapters",
        lambda x: x.update({PART: torch.ones(3, 16)}),
        r"lora_A\.weight is \[3, 16\]; expected \[2, 16\]$",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_parameter_that_does_not_fit_is_named(misfit, tmp_path):
    """Where a training resumes, and where a wrapper is loaded; transformers and PEFT leave it at a warning."""
    made, change, words = MISFITS[misfit]
    model = {"plain": llama, "mixture": mixtral}.get(made, lambda: adapted(tmp_path / "base"))()
    run = trainer(model, tmp_path / "out", 1)
    run.model.save_pretrained(tmp_path / "saved")
    run._load_from_checkpoint(str(tmp_path / "saved"))
    edit(tmp_path / "saved" / ("adapter_model.safetensors" if made == "adapters" else "model.safetensors"), change)
    before = state(run.model)
    with pytest.raises(ValueError, match=rf"saved does not fit [\s\S]*{words}"):
        run._load_from_checkpoint(str(tmp_path / "saved"))
    assert same(before, state(run.model))
    advice = "" if made == "adapters" else r"; MTPWrapper\.with_saved_heads\(model, folder\)"
    with pytest.raises(ValueError, match=rf"saved does not fit [\s\S]*{words.removesuffix('$')}{advice}"):
        MTPWrapper.from_pretrained(tmp_path / "saved")


def test_mixed_dtypes_are_restored_bit_for_bit(tmp_path):
    """A model in bf16 but for its norms and output layer, whose files are not read in bf16."""
    model = llama().bfloat16()
    model.lm_head.float()
    model.model.norm.float()
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4)
    run = trainer(llama(), tmp_path, 1)
    run.model.model = model
    wanted = state(run.model)
    run.model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    run._load_from_checkpoint(str(tmp_path / "saved"))
    assert {x.dtype for x in wanted.values()} == {torch.float32, torch.bfloat16}
    assert same(wanted, state(run.model))


# --- adapters


def test_adapters_are_read_whatever_version_transformers_asks_for(tmp_path, monkeypatch):
    """transformers' own reading of adapters refuses versions of PEFT that read them well."""

    def refuse(**_: Any) -> None:
        raise ValueError("The version of PEFT you are using is not compatible")

    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", refuse)
    run = trainer(adapted(tmp_path / "base"), tmp_path / "out", 1)
    run.train()
    again = MTPWrapper.from_pretrained(tmp_path / "out" / "checkpoint-1")
    assert same(state(again), state(run.model))
    resumed = trainer(adapted(tmp_path / "base", seed=7), tmp_path / "out", 1)
    resumed.train(resume_from_checkpoint=True)
    assert same(state(resumed.model), state(run.model))


def test_an_output_directory_with_checkpoints_in_it_is_loaded_without_them(tmp_path):
    """save_model writes beside them; PEFT writes adapters of a name into such folders."""
    run = trainer(adapted(tmp_path / "base"), tmp_path / "out", 2)
    run.train()
    run.save_model()
    again = MTPWrapper.from_pretrained(tmp_path / "out")
    assert list(again.model.peft_config) == ["default"]
    assert same(state(again), state(run.model))


def test_adapters_beside_their_base_need_no_other_folder(tmp_path):
    """As transformers reads them."""
    wrapper = MTPWrapper(adapted(tmp_path / "base"), 3)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    wrapper.causal.config.save_pretrained(tmp_path / "saved")
    LlamaForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "saved")
    wrapper.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "base")
    assert same(state(MTPWrapper.from_pretrained(tmp_path / "saved")), state(wrapper))


def test_adapters_of_a_model_that_was_never_saved_are_put_on_it(tmp_path):
    """The advice in the error works."""
    wrapper = MTPWrapper(get_peft_model(llama(), LORA), 3)
    with torch.no_grad():
        wrapper.heads.blocks[0].weight.add_(1)
        wrapper.model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    wrapper.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"adapters of a model that was never saved: .*with_saved_heads\(model, folder\)"
    ):
        MTPWrapper.from_pretrained(tmp_path)
    again = MTPWrapper.with_saved_heads(PeftModel.from_pretrained(llama(), tmp_path), tmp_path)
    assert same(state(again), state(wrapper))


def test_what_is_trained_beside_adapters_and_not_written_is_named(tmp_path):
    """PEFT leaves it out without a word; a training that is resumed would go back to the base's values."""
    run = trainer(adapted(tmp_path / "base"), tmp_path / "out", 1)
    run.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run.model.save_pretrained(tmp_path / "whole")
    run.model.causal.model.norm.weight.requires_grad_(True)
    words = r"model\.norm\.weight is trained, and PEFT does not write it; expected its module among modules_to_save"
    with pytest.warns(UserWarning, match=rf"part is written without all that is trained: .*{words}"):
        run.model.save_pretrained(tmp_path / "part")
    with pytest.raises(ValueError, match=words):
        run._load_from_checkpoint(str(tmp_path / "part"))


def test_biases_that_peft_writes_are_not_left_out(tmp_path):
    """They are the base's own parameters, and in the adapters' file."""
    LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    run = trainer(get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), lora), tmp_path, 1)
    run.train()
    wanted = state(run.model)
    assert any(x.requires_grad and name.endswith("q_proj.base_layer.bias") for name, x in run.model.named_parameters())
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    run._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert same(wanted, state(run.model))
    assert same(wanted, state(MTPWrapper.from_pretrained(tmp_path / "checkpoint-1")))


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_resumed_and_loaded(kind, tmp_path):
    llama().save_pretrained(tmp_path / "base")

    def model(seed: int) -> Any:
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        return get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))

    whole, resumed = trainer(model(0), tmp_path / "whole", 2), trainer(model(7), tmp_path / "resumed", 2)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert same(state(whole.model), state(resumed.model))
    assert same(state(whole.model), state(MTPWrapper.from_pretrained(tmp_path / "whole" / "checkpoint-2")))


@pytest.mark.parametrize(
    ("kind", "options"), [(PromptEncoderConfig, {}), (PrefixTuningConfig, {"prefix_projection": True})]
)
def test_virtual_tokens_whose_encoder_peft_does_not_write_are_used_and_not_trained_further(kind, options, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16, **options)
    run, words = (
        trainer(get_peft_model(base, config), tmp_path, 1),
        r"PEFT writes only the virtual tokens that it comput",
    )
    with pytest.warns(UserWarning, match=rf"without all that is trained: prompt_encoder\.default\..* {words}"):
        run.train()
    with pytest.raises(ValueError, match=words):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=rf"checkpoint-1 has adapters that can't be trained further: .*{words}"):
        MTPWrapper.from_pretrained(tmp_path / "checkpoint-1")
    again = MTPWrapper.from_pretrained(tmp_path / "checkpoint-1", trunk="frozen").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS, labels=TOKENS).loss, run.model.eval()(TOKENS, labels=TOKENS).loss)


def test_a_quantised_model_is_resumed_by_its_heads(tmp_path):
    """Its own parameters are not trained, and stay as they were loaded."""
    run = trainer(llama(), tmp_path, 1)
    run.train()
    (tmp_path / "checkpoint-1" / "model.safetensors").unlink()
    other = trainer(llama(7), tmp_path / "other", 1)
    other.model.model.is_quantized = True
    before = state(other.model.model)
    other._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert same(state(other.model.heads), state(run.model.heads))
    assert same(state(other.model.model), before)


def test_adapters_without_peft_name_the_extra(tmp_path, monkeypatch):
    MTPWrapper(adapted(tmp_path / "base"), 3).save_pretrained(tmp_path / "saved")
    monkeypatch.delattr(peft, "get_peft_model")
    with pytest.raises(ImportError, match=r"saved has adapters, which PEFT reads; pip install 'mtp_ce\[adapters\]'"):
        MTPWrapper.from_pretrained(tmp_path / "saved")


# --- heads on a model that is loaded


def test_saved_heads_go_on_a_model_that_is_loaded(tmp_path):
    """In its dtype; with the heads' two files alone, too, of any kind."""
    wrapper = MTPWrapper(llama(), 3, heads="sequential")
    wrapper.heads.save_pretrained(tmp_path / "heads")
    model = llama(7)
    again = MTPWrapper.with_saved_heads(model, tmp_path / "heads", trunk="frozen", loss="logits", z_loss=1e-3)
    assert again.model is model
    assert (again.kind, again.trunk, again.loss) == ("sequential", "frozen", "logits")
    plain = MTPWrapper.with_saved_heads(model, tmp_path / "heads", trunk="frozen")
    assert again(TOKENS, labels=TOKENS).loss > plain(TOKENS, labels=TOKENS).loss + 1e-3
    assert same(state(again.heads), state(wrapper.heads))
    assert not any(x.requires_grad for x in model.parameters())
    half = MTPWrapper.with_saved_heads(llama().bfloat16(), tmp_path, subfolder="heads")
    assert {x.dtype for x in half.heads.parameters()} == {torch.bfloat16}
    with pytest.raises(TypeError, match="trunks"):
        MTPWrapper.with_saved_heads(model, tmp_path / "heads", trunks="frozen")
    with pytest.raises(ValueError, match=r"heads of hidden size 16 and a model of 32"):
        MTPWrapper.with_saved_heads(LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 32})), tmp_path / "heads")
    with pytest.raises(
        ValueError, match=r"kind 'sequential'; expected 'residual'\. MTPWrapper\.with_saved_heads\(model"
    ):
        MTPHeads.from_pretrained(tmp_path / "heads")


def test_an_unknown_key_in_the_heads_configuration_is_named(tmp_path):
    """It may change what the heads compute."""
    MTPHeads(16, 3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "mtp_heads.json").read_text())
    (tmp_path / "mtp_heads.json").write_text(json.dumps({**config, "tied": True}))
    for load in (MTPHeads.from_pretrained, lambda folder: MTPWrapper.with_saved_heads(llama(), folder)):
        with pytest.raises(ValueError, match=r"mtp_heads\.json has the unknown key 'tied', perhaps of a later version"):
            load(tmp_path)


def test_a_configuration_that_names_no_class_with_an_output_layer_is_read_as_a_language_model(tmp_path):
    """A base model's files, whose output layer is that of the embeddings; and a configuration without a class."""
    model = llama(tie_word_embeddings=True)
    MTPWrapper(model, 3).save_pretrained(tmp_path)
    model.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [LlamaModel.__name__]
    assert same(state(MTPWrapper.from_pretrained(tmp_path).causal), state(model))
    config = json.loads((tmp_path / "config.json").read_text())
    for named in (None, [], ["NoSuchModel"], ["load_tool"], ["MixtralForCausalLM"]):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": named}))
        assert type(MTPWrapper.from_pretrained(tmp_path).causal) is LlamaForCausalLM


# --- parameters without values


def test_a_model_with_offloaded_parameters_is_refused(tmp_path):
    """Their output layer has no values where the loss reads it."""
    llama().save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    for devices in ({**places, "model.rotary_emb": "cpu"}, {"": "disk"}):
        model = LlamaForCausalLM.from_pretrained(
            tmp_path / "model", device_map=devices, offload_folder=str(tmp_path / "offloaded")
        )
        with pytest.raises(ValueError, match=r"model has offloaded parameters, such as .*without device_map, or with "):
            MTPWrapper(model, 3)
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "model", device_map={"": "cpu"})
    assert MTPWrapper(whole, 3)(TOKENS, labels=TOKENS).loss.isfinite()


def test_parameters_on_the_meta_device_are_neither_written_nor_read_into(tmp_path):
    MTPWrapper(llama(), 3).save_pretrained(tmp_path / "saved")
    with torch.device("meta"):
        model = llama()
    wrapper = MTPWrapper(model, 3)
    words = r" is on the meta device: .*module\.to_empty\(device=\.\.\.\)"
    for write in (wrapper.save_pretrained, wrapper.heads.save_pretrained):
        with pytest.raises(ValueError, match=words):
            write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="MTPHeads" + words):
        MTPWrapper.with_saved_heads(model, tmp_path / "saved")
    run = trainer(llama(), tmp_path, 1)
    run.model.model = model
    with pytest.raises(ValueError, match="LlamaForCausalLM" + words):
        run._load_from_checkpoint(str(tmp_path / "saved"))
    wrapper.to_empty(device="cpu")
    wrapper.save_pretrained(tmp_path / "out")
