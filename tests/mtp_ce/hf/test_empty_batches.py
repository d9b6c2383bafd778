"""A batch without a target, as a truncated completion leaves one: the loss is exactly 0, whatever it is divided by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, TrainingArguments

from mtp_ce import MTPWrapper

V, H = 61, 4
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS = ["none", "teacher_forcing", "residual", "layer", "sequential"]
TOKENS = torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(0))
MASKED = torch.full_like(TOKENS, -100)
# Labels that no head predicts: the first token of a row, which has none before it.
FIRST = MASKED.clone().index_fill_(1, torch.tensor([0]), 3)


def wrap(kind: str = "residual", experts: bool = False, **options: Any) -> MTPWrapper:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    if experts:
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, output_router_logits=True))
    return MTPWrapper(model, 1 if kind == "none" else H, heads=kind, **options)


@pytest.mark.parametrize("reduction", ["target", "live", "horizon"])
@pytest.mark.parametrize("path", ["linear", "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_target_loss_and_gradients_are_exactly_zero(kind, path, reduction):
    """For every count that a trainer may pass, 0 included; the loss stays connected to the parameters."""
    for labels in (MASKED, FIRST):
        for count in (None, torch.tensor(0), torch.tensor(0.0), torch.tensor(7), 7):
            wrapper = wrap(kind, loss=path, head_reduction=reduction)
            loss = wrapper(TOKENS, labels=labels, num_items_in_batch=count).loss
            assert loss.item() == 0.0, count
            loss.backward()
            gradients = [x.grad for x in wrapper.parameters() if x.grad is not None]
            assert gradients
            assert all((x == 0).all() for x in gradients)


@pytest.mark.parametrize("kind", ["residual", "teacher_forcing"])
def test_without_a_target_the_routers_are_not_trained_either(kind):
    """Their fraction of the batch is 0 of 0."""
    wrapper = wrap(kind, experts=True)
    loss = wrapper(TOKENS, labels=MASKED, num_items_in_batch=torch.tensor(0)).loss
    assert loss.item() == 0.0
    loss.backward()
    assert all((x.grad == 0).all() for x in wrapper.parameters() if x.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_completion_leaves_every_weight_as_it_was(kind, tmp_path):
    """Through the trainer: its count is 0, and its log reads 0.0 whatever happens to the weights."""
    pytest.importorskip("accelerate")
    from mtp_ce import MTPTrainer

    wrapper = wrap(kind)
    before = {name: x.clone() for name, x in wrapper.state_dict().items()}
    rows = [{"input_ids": row, "labels": torch.full_like(row, -100)} for row in TOKENS]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, weight_decay=0.0, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = MTPTrainer(model=wrapper, args=arguments, train_dataset=rows)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == [0.0, 0.0]
    assert [entry["grad_norm"] for entry in logged] == [0.0, 0.0]
    for name, x in wrapper.state_dict().items():
        assert torch.equal(x, before[name]), name
