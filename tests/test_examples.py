"""The examples run, and show what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mtp_ce import MTPWrapper

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def finetune():
    spec = importlib.util.spec_from_file_location("finetune", ROOT / "examples" / "finetune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
