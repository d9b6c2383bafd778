"""`export-mtp` writes whole folders, and answers a mistake in one line, with exit code 2, before torch is imported."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from mtp_ce import MTPWrapper
from mtp_ce.training.cli.export import main

MISTAKES = {
    "no checkpoint": (["nowhere", "base", "new"], ["nowhere is not a folder", "MTPWrapper.save_pretrained"]),
    "a file": (["file.txt", "base", "new"], ["file.txt is not a folder"]),
    "no heads": (["empty", "base", "new"], ["empty has no mtp_heads.json"]),
    "damaged": (["damaged", "heads", "new"], ["damaged/mtp_heads.json can't be read", "save the heads again"]),
    "more heads than tensors": (["many", "heads", "new"], ["has 2 extra heads, and mtp_heads.json", "horizon 1000000"]),
    "half a checkpoint": (["half", "base", "new"], ["half has mtp_heads.json but no config.json"]),
    "no tensors": (["layer", "heads", "new"], ["layer has mtp_heads.json but no mtp_heads.safetensors"]),
    "heads that are no Medusa": (["layer", "medusa", "new"], ["'layer' heads with horizon 3", "needs 'residual'"]),
    "heads that no engine runs": (["layer", "mimo", "new"], ["no serving engine runs 'layer' heads", "'sequential'"]),
    "heads that are no module": (["half", "qwen", "new"], ["'residual' heads", "mtp.kind=sequential", "shared=true"]),
    "one head": (["one", "medusa", "new"], ["'residual' heads with horizon 1", "a horizon above 1"]),
    "no parameters": (["teacher", "heads", "new"], ["'teacher_forcing' heads", "'residual' or 'layer'"]),
    "existing folder": (["half", "heads", "empty"], ["folder empty exists", "name another"]),
    "below a file": (["half", "heads", "file.txt/new"], ["file.txt is a file"]),
    "unknown part": (["half", "medusas", "new"], ["medusas", "choose from", "--help"]),
    "nothing said": ([], ["required", "--help"]),
}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Everything that the mistakes refer to."""
    (tmp_path / "file.txt").write_text("a file")
    for name, heads in {
        "empty": None,
        "damaged": "{",
        "half": {"kind": "residual", "hidden_size": 8, "horizon": 3},
        "layer": {"kind": "layer", "hidden_size": 8, "horizon": 3},
        "many": {"kind": "residual", "hidden_size": 8, "horizon": 1_000_000},
        "one": {"kind": "residual", "hidden_size": 8, "horizon": 1},
        "teacher": {"kind": "teacher_forcing", "hidden_size": 8, "horizon": 3},
    }.items():
        (tmp_path / name).mkdir()
        if heads is not None:
            (tmp_path / name / "mtp_heads.json").write_text(heads if isinstance(heads, str) else json.dumps(heads))
    for name in ("half", "many"):
        save_file({f"blocks.{h}.bias": torch.zeros(8) for h in range(2)}, tmp_path / name / "mtp_heads.safetensors")
    return tmp_path


def test_a_mistake_costs_one_line_and_no_torch(refused, workplace):
    refused("export-mtp", MISTAKES, workplace)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: model, heads and tokenizer, tiny and untrained."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from mtp_ce import MTPWrapper

    folder = tmp_path_factory.mktemp("run")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    MTPWrapper(LlamaForCausalLM(LlamaConfig(vocab_size=5, **sizes)), 3).save_pretrained(folder / "model")
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder / "model")
    return folder


def test_a_base_has_the_model_and_its_tokenizer(checkpoint, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main([str(checkpoint), "base", str(tmp_path / "new" / "base")]) == 0
    assert os.listdir(tmp_path / "new") == ["base"]
    assert str(tmp_path / "new" / "base") in capsys.readouterr().out
    assert not any("mtp" in name for name in os.listdir(tmp_path / "new" / "base"))
    ours, theirs = (AutoModelForCausalLM.from_pretrained(x) for x in (tmp_path / "new" / "base", checkpoint / "model"))
    assert torch.equal(ours(torch.arange(5)[None]).logits, theirs(torch.arange(5)[None]).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "base")("a b")["input_ids"] == [0, 1]


def test_a_model_without_a_tokenizer_is_a_base_too(checkpoint, tmp_path):
    shutil.copytree(checkpoint / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    assert main([str(tmp_path / "bare"), "base", str(tmp_path / "base")]) == 0
    assert not any("token" in name for name in os.listdir(tmp_path / "base"))


def test_heads_are_the_checkpoints_own_files(checkpoint, tmp_path):
    """The folder of a run and the one inside it with the model are both a checkpoint."""
    for i, source in enumerate((checkpoint, checkpoint / "model")):
        assert main([str(source), "heads", str(tmp_path / str(i))]) == 0
        assert sorted(os.listdir(tmp_path / str(i))) == ["mtp_heads.json", "mtp_heads.safetensors"]
        for name in os.listdir(tmp_path / str(i)):
            assert (tmp_path / str(i) / name).read_bytes() == (checkpoint / "model" / name).read_bytes()


def sequential(model: PreTrainedModel, folder: Path) -> Path:
    """Write a checkpoint of a model with one module for two depths."""
    MTPWrapper(model, 3, heads="sequential", shared=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", ["medusa", "mimo"])
def test_a_draft_model_comes_with_its_commands(part, checkpoint, tmp_path, capsys):
    source = checkpoint
    if part == "mimo":
        source = sequential(LlamaForCausalLM.from_pretrained(checkpoint / "model"), tmp_path / "sequential")
    assert main([str(source), part, str(tmp_path / "a draft")]) == 0
    assert json.loads((tmp_path / "a draft" / "config.json").read_text())["hidden_size"] == 8
    _, vllm, *sglang = capsys.readouterr().out.splitlines()
    words = shlex.split(vllm)
    assert words[:3] == ["vllm", "serve", "BASE"]
    options = {name: json.loads(value) for name, value in zip(words[3::2], words[4::2], strict=True)}
    method = {"medusa": "medusa", "mimo": "mtp"}[part]
    speculation = {"method": method, "model": str(tmp_path / "a draft"), "num_speculative_tokens": 2}
    assert options.pop("--speculative-config") == speculation
    assert options == ({} if part == "medusa" else {"--hf-overrides": {"num_nextn_predict_layers": 1}})
    assert ["sglang.launch_server --model-path BASE" in line for line in sglang] == [True] * (part == "mimo")


def test_a_model_with_its_module_comes_with_its_commands(tmp_path, capsys):
    sizes = {"vocab_size": 5, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    experts = {"moe_intermediate_size": 4, "n_routed_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 0}
    model = Glm4MoeForCausalLM(Glm4MoeConfig(num_attention_heads=2, num_key_value_heads=2, **sizes, **experts))
    source, whole = sequential(model, tmp_path / "sequential"), str(tmp_path / "whole")
    assert main([str(source), "deepseek", whole]) == 0
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (1, 1)
    _, note, vllm, sglang = capsys.readouterr().out.splitlines()
    assert "not trained on" in note
    *words, speculation = shlex.split(vllm)
    assert words == ["vllm", "serve", whole, "--speculative-config"]
    assert json.loads(speculation) == {"method": "mtp", "num_speculative_tokens": 1}
    assert shlex.split(sglang)[3:5] == ["--model-path", whole]
    assert sglang.endswith("--speculative-num-steps 2 --speculative-eagle-topk 1 --speculative-num-draft-tokens 3")
    # Read as its own module, the model is written the same again.
    MTPWrapper(Glm4MoeForCausalLM.from_pretrained(whole), 3, heads="native").save_pretrained(tmp_path / "native")
    assert main([str(tmp_path / "native"), "deepseek", str(tmp_path / "again")]) == 0
    assert '"num_speculative_tokens": 2}' in capsys.readouterr().out
    assert set(os.listdir(tmp_path / "again")) == set(os.listdir(whole))
    # The other layout is refused in one line, and leaves nothing.
    assert main([str(source), "qwen", str(tmp_path / "other")]) == 2
    assert "has model_type 'glm4_moe'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_what_only_the_model_can_say_is_one_line_too_and_leaves_nothing(tmp_path, capsys):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, **attention, final_logit_softcapping=5.0))
    MTPWrapper(capped, 2).save_pretrained(tmp_path / "capped")
    capsys.readouterr()
    assert main([str(tmp_path / "capped"), "medusa", str(tmp_path / "medusa")]) == 2
    complained = capsys.readouterr().err
    assert complained.startswith("export-mtp: error: wrapper.model's logits have a softcap of 5.0")
    (tmp_path / "capped" / "config.json").write_text("{}")
    assert main([str(tmp_path / "capped"), "base", str(tmp_path / "base")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == ["capped"]
