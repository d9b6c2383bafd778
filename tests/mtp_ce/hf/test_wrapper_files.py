"""A wrapper's folder: the model's own files, which load alone, and the heads' beside them."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import hub

import mtp_ce.hf.saved_heads
from mtp_ce import MTPHeads, MTPWrapper

V = 61
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOKENS = torch.randint(2, V, (2, 12), generator=torch.Generator().manual_seed(1))


def wrap(model: Any = None, kind: Any = "residual", **options: Any) -> MTPWrapper:
    """A tiny model and heads; trainable parameters differ from their initial values."""
    torch.manual_seed(0)
    wrapper = MTPWrapper(LlamaForCausalLM(LlamaConfig(**SIZES)) if model is None else model, 3, heads=kind, **options)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return wrapper.eval()


def adapted(folder: Any, **options: Any) -> Any:
    """A model that PEFT has put adapters into; its base lies in the folder."""
    peft = pytest.importorskip("peft")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    return peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    )


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no mtp_heads\.json"):
        MTPWrapper.from_pretrained(tmp_path)
    MTPHeads(24, 3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="heads of hidden size 24 and a model of 16"):
        MTPWrapper.from_pretrained(tmp_path)
    MTPHeads(16, 3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "mtp_heads.json").read_text())
    (tmp_path / "mtp_heads.json").write_text(json.dumps({**config, "horizon": 5}))
    with pytest.raises(ValueError, match=r"mtp_heads\.safetensors has 2 extra heads, and mtp_heads\.json .* horizon 5"):
        MTPWrapper.from_pretrained(tmp_path)
    (tmp_path / "mtp_heads.json").write_text(json.dumps({**config, "horizon": 2}))
    with pytest.raises(ValueError, match=r"mtp_heads\.safetensors has 2 extra heads, and mtp_heads\.json .* horizon 2"):
        MTPWrapper.from_pretrained(tmp_path)


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_of_the_model_alone_is_refused(strict):
    """What trainers find in model.safetensors has none of the wrapper's names; strict=False would load nothing."""
    wrapper = wrap()
    with pytest.raises(ValueError, match=r"none of the wrapper's own names.*MTPWrapper\.from_pretrained.*MTPTrainer"):
        wrapper.load_state_dict(wrapper.model.state_dict(), strict=strict)
    assert not wrapper.load_state_dict(wrapper.state_dict()).missing_keys
    heads = {f"heads.{name}": x for name, x in wrapper.heads.state_dict().items()}
    assert not wrapper.load_state_dict(heads, strict=False).unexpected_keys


def test_only_the_main_process_writes(tmp_path):
    """Others are called with an empty state dict; the heads that are there stay."""
    wrapper = wrap()
    wrapper.save_pretrained(tmp_path / "a", is_main_process=True, state_dict=wrapper.state_dict())
    before = (tmp_path / "a" / "mtp_heads.safetensors").read_bytes()
    wrapper.save_pretrained(tmp_path / "a", is_main_process=False, state_dict={})
    assert (tmp_path / "a" / "mtp_heads.safetensors").read_bytes() == before
    wrapper.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not list((tmp_path / "b").glob("mtp_heads*"))


def test_an_empty_state_dict_writes_no_heads(tmp_path):
    """DeepSpeed passes one where it can't gather the parameters; its own files have them."""
    wrapper = wrap()
    wrapper.save_pretrained(tmp_path)
    before = (tmp_path / "mtp_heads.safetensors").read_bytes()
    wrapper.save_pretrained(tmp_path, state_dict={})
    assert (tmp_path / "mtp_heads.safetensors").read_bytes() == before


def test_heads_are_sought_where_the_model_is(tmp_path, monkeypatch):
    """In the same revision, folder and cache, with the same token."""
    options = {
        "revision": "v2",
        "token": "t",
        "subfolder": "inner",
        "cache_dir": str(tmp_path),
        "local_files_only": True,
        "force_download": False,
        "proxies": {},
    }
    seen = []
    monkeypatch.setattr(mtp_ce.hf.saved_heads, "cached_file", lambda source, name, **given: seen.append((name, given)))
    with pytest.raises(FileNotFoundError):
        MTPWrapper.from_pretrained("org/model", dtype=torch.bfloat16, **options)
    assert [name for name, _ in seen] == ["mtp_heads.json", "mtp_heads.safetensors"]
    for _, given in seen:
        assert given == {**options, "_raise_exceptions_for_missing_entries": False}


def test_a_wrapper_in_an_inner_folder_is_read(tmp_path):
    wrapper = wrap()
    wrapper.save_pretrained(tmp_path / "inner")
    again = MTPWrapper.from_pretrained(tmp_path, subfolder="inner").eval()
    assert torch.equal(again(TOKENS, labels=TOKENS).loss, wrapper(TOKENS, labels=TOKENS).loss)


def test_options_of_the_loss_are_given_anew(tmp_path):
    """They belong to a training, not to the model."""
    wrap(label_smoothing=0.1).save_pretrained(tmp_path)
    assert MTPWrapper.from_pretrained(tmp_path).loss_options.label_smoothing == 0
    again = MTPWrapper.from_pretrained(tmp_path, loss="logits", label_smoothing=0.2, z_loss=1e-3)
    options = again.loss_options
    assert (again.loss, options.label_smoothing, options.z_loss) == ("logits", 0.2, 1e-3)


@pytest.mark.parametrize("whole", [None, ["lm_head"]], ids=["adapters", "and a whole layer"])
def test_reloaded_adapters_are_trained_further_where_the_model_is(whole, tmp_path):
    """The same parameters as before, and no others; what was saved once is saved and read again."""
    wrapper = wrap(adapted(tmp_path / "base", modules_to_save=whole))
    wrapper.save_pretrained(tmp_path / "saved")
    again = MTPWrapper.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.eval()(TOKENS, labels=TOKENS).loss, wrapper(TOKENS, labels=TOKENS).loss)

    def learning(of: MTPWrapper) -> set[str]:
        return {name.replace("base_model.model.", "") for name, x in of.named_parameters() if x.requires_grad}

    assert learning(again) == learning(wrapper)
    again(TOKENS, labels=TOKENS).loss.backward()
    moved = [name for name, x in again.model.named_parameters() if x.grad is not None and x.grad.abs().sum() > 0]
    assert moved
    again.save_pretrained(tmp_path / "again")
    third = MTPWrapper.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(third(TOKENS, labels=TOKENS).loss, wrapper(TOKENS, labels=TOKENS).loss)
    frozen = MTPWrapper.from_pretrained(tmp_path / "saved", trunk="frozen")
    assert not any(x.requires_grad for x in frozen.model.parameters())


def test_model_and_heads_go_to_the_hub_together(tmp_path, monkeypatch):
    """In one upload; the model alone is refused."""
    wrapper = wrap()
    with pytest.raises(ValueError, match=r"push_to_hub is True; .* push_to_hub\(repo_id\) uploads both"):
        wrapper.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()

    class Hub:
        def create_repo(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=name)

    def upload(self: Any, folder: str, name: str, **_: Any) -> str:
        shutil.copytree(folder, tmp_path / name)
        return "the commit"

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("---\n---\n"))
    monkeypatch.setattr(MTPWrapper, "_upload_modified_files", upload)
    assert wrapper.push_to_hub("somebody") == "the commit"
    there = MTPWrapper.from_pretrained(tmp_path / "somebody").eval()
    assert torch.equal(there(TOKENS, labels=TOKENS).loss, wrapper(TOKENS, labels=TOKENS).loss)
