"""The examples run, and show what they say."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mtp_ce import MTPWrapper

ROOT = Path(__file__).resolve().parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finetune():
    return load("finetune")


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_accumulated_micro_batches_give_the_losses_of_one_batch(finetune, trainer, tmp_path):
    losses = {}
    for accumulation in ("1", "4"):
        output = tmp_path / accumulation
        options = ["--trainer", trainer, "--steps", "4", "--length", "48", "--output", str(output)]
        losses[accumulation] = finetune.main([*options, "--accumulation", accumulation])
    assert losses["1"] == pytest.approx(losses["4"], rel=1e-4)
    assert losses["1"][-1] < losses["1"][0]
    tokens = torch.arange(20)[None]
    wrapper = MTPWrapper.from_pretrained(tmp_path / "1").eval()
    assert wrapper.horizon == 4
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "1").eval()(tokens).logits, wrapper(tokens).logits
    )


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_a_resumed_run_is_the_uninterrupted_one_and_both_end_with_the_best(finetune, trainer, tmp_path):
    """To the last bit, heads of decoder layers included."""
    options = ["--trainer", trainer, "--heads", "sequential", "--horizon", "2", "--length", "48", "--steps", "6"]
    options += ["--save-steps", "2", "--lr", "0.1"]
    losses = finetune.main([*options, "--output", str(tmp_path / "whole")])
    earlier, last = sorted((tmp_path / "whole").glob("checkpoint-*"))
    assert last.name == "checkpoint-6"
    resumed = finetune.main([*options, "--output", str(tmp_path / "resumed"), "--resume", str(earlier)])
    assert resumed == losses
    state = json.loads((last / "trainer_state.json").read_text())
    evaluated = {x["step"]: x["eval_loss"] for x in state["log_history"] if "eval_loss" in x}
    best = tmp_path / "whole" / f"checkpoint-{min(evaluated, key=evaluated.__getitem__)}"
    whole, again, kept = (
        MTPWrapper.from_pretrained(folder).state_dict() for folder in (tmp_path / "whole", tmp_path / "resumed", best)
    )
    for name, x in kept.items():
        assert torch.equal(x, whole[name]), name
        assert torch.equal(x, again[name]), name


@pytest.mark.slow
def test_a_chat_fine_tune_saves_resumes_evaluates_decodes_and_exports(tmp_path):
    """SmolLM2-135M with LoRA through MTPTrainer, SFTTrainer: a resumed run is the uninterrupted one, bit for bit."""
    chat = load("chat")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    before = chat.main(["--steps", "1", "--save-steps", "1", "--output", str(tmp_path / "one")])
    metrics = chat.main(["--steps", "12", "--save-steps", "6", "--output", str(whole)])
    assert metrics["eval_loss"] < before["eval_loss"] - 1
    assert all(metrics[f"eval_ce_head_{h}"] < before[f"eval_ce_head_{h}"] for h in range(4))
    assert metrics["tokens_per_forward"] >= 1
    # As after a kill behind the first checkpoint.
    shutil.copytree(whole / "checkpoint-6", cut / "checkpoint-6")
    shutil.copytree(whole / "export", cut / "export")
    resumed_metrics = chat.main(["--steps", "12", "--save-steps", "6", "--output", str(cut), "--resume"])
    assert resumed_metrics["eval_loss"] == metrics["eval_loss"]
    trained, resumed = (MTPWrapper.from_pretrained(folder).state_dict() for folder in (whole, cut))
    assert trained.keys() == resumed.keys()
    assert all(torch.equal(x, resumed[name]) for name, x in trained.items())
    tokens = torch.arange(20)[None]
    assert (cut / "export" / "medusa" / "config.json").exists()
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(cut / "export" / "base")(tokens).logits
        adapted = MTPWrapper.from_pretrained(whole)(tokens).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=1e-3)
    assert (whole / "export" / "medusa" / "model.safetensors").is_file()
