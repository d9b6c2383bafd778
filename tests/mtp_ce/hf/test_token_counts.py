"""One definition of N: every supervised token has weight 1, whatever is masked around it and however it is batched.

A model whose output layer is zero has the cross entropy ln V in every row, to the last bits. A loss of ln V says that
the coefficients of all rows sum to 1, and the gradient with respect to a token's weight what the token counts for.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, TrainingArguments

from mtp_ce import MTPWrapper

V = 61
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EXACT = {"rtol": 2e-6, "atol": 0.0}


def wrap(horizon: int, kind: str = "residual", uniform: bool = True, **options: Any) -> MTPWrapper:
    """A wrapper, uniform over the vocabulary or sharp."""
    torch.manual_seed(0)
    wrapper = MTPWrapper(LlamaForCausalLM(LlamaConfig(**SIZES)), horizon, heads=kind, **options)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if uniform:
            wrapper.get_output_embeddings().weight.zero_()
    return wrapper.eval()


def draw_rows(seed: int, rows: int, length: int, masked: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels masked in runs and one by one, and positions of packed documents, whose first label is masked."""
    generator = torch.Generator().manual_seed(seed)

    def share() -> Tensor:
        return torch.rand(rows, length, generator=generator)

    tokens = torch.randint(V, (rows, length), generator=generator)
    positions = torch.arange(length).expand(rows, -1).clone()
    begins = share() < 0.15
    for b, t in begins.nonzero().tolist():
        positions[b, t:] = torch.arange(length - t)
    prompt = (share() < 0.3).int().cumsum(1) % 2 == 1
    labels = tokens.masked_fill((share() < masked) | (prompt & (masked > 0)) | (positions == 0), -100)
    return tokens, labels, positions


KINDS = st.sampled_from(["residual", "sequential", "teacher_forcing"])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), horizon=st.integers(1, 8), kind=KINDS, masked=st.floats(0, 1),
    path=st.sampled_from(["linear", "logits"]), cuts=st.lists(st.integers(1, 5), max_size=3),
)  # fmt: skip
def test_any_masking_in_any_micro_batches_is_a_loss_of_ln_vocabulary_and_weight_1_for_each_token(
    seed, horizon, kind, masked, path, cuts
):
    tokens, labels, positions = draw_rows(seed, rows=6, length=14, masked=masked)
    wrapper = wrap(horizon, kind, loss=path)
    supervised = labels != -100
    supervised[:, 0] = False
    count = supervised.sum()  # as Trainer counts
    weights = torch.ones(6, 14, requires_grad=True)
    sections = [len(x) for x in torch.arange(6).tensor_split(sorted(cuts))]
    parts = zip(*(x.split(sections) for x in (tokens, labels, positions, weights)), strict=True)
    losses = [
        wrapper(x, labels=y, position_ids=p, token_weights=w, num_items_in_batch=count).loss
        for x, y, p, w in parts
        if len(x)
    ]
    total = sum(losses)
    if not count:
        assert total.item() == 0.0
        return
    torch.testing.assert_close(total, torch.tensor(math.log(V)), **EXACT)
    total.backward()
    expected = supervised * math.log(V) / count
    torch.testing.assert_close(weights.grad, expected.float(), **EXACT)
    alone = wrapper(tokens, labels=labels, position_ids=positions)
    torch.testing.assert_close(alone.loss, torch.tensor(math.log(V)), **EXACT)  # its own count is the same


@pytest.mark.parametrize("kind", ["residual", "teacher_forcing"])
def test_a_short_answer_counts_as_much_a_token_as_a_long_one(kind):
    """Answers of one token and of ten in a batch; by positions the short one's token counted four times."""
    tokens = torch.randint(V, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(tokens, -100)
    labels[0, 8], labels[1, 6:] = tokens[0, 8], tokens[1, 6:]
    weights = torch.ones(2, 16, requires_grad=True)
    wrapper = wrap(4, kind)
    (by_token,) = torch.autograd.grad(wrapper(tokens, labels=labels, token_weights=weights).loss, weights)
    assert by_token[labels == -100].abs().max() == 0
    torch.testing.assert_close(by_token[labels != -100], torch.full((11,), math.log(V) / 11), **EXACT)
    live = wrapper(tokens, labels=labels, token_weights=weights, head_reduction="live", num_items_in_batch=11).loss
    (by_position,) = torch.autograd.grad(live, weights)
    assert by_position[0, 8] / by_position[1, 12] > 3.9


@pytest.mark.parametrize("horizon", [2, 4, 8])
def test_a_one_token_answer_has_the_gradient_of_one_token(horizon):
    """Of the trunk, too: as large as that of its heads' mean, not H times."""
    tokens = torch.randint(V, (1, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(tokens, -100)
    labels[0, 12] = tokens[0, 12]
    wrapper = wrap(horizon, uniform=False)
    output = wrapper(tokens, labels=labels, num_items_in_batch=1, return_stats=True)
    torch.testing.assert_close(output.loss, output.stats.ce.sum() / horizon)


def test_one_head_is_transformers_own_loss_over_masked_rows_in_micro_batches():
    tokens, labels, _ = draw_rows(3, rows=4, length=14, masked=0.5)
    wrapper = wrap(1, "none", uniform=False)
    count = (labels[:, 1:] != -100).sum()
    for x, y in zip(tokens.split(2), labels.split(2), strict=True):
        own = wrapper.causal(x, labels=y, num_items_in_batch=count).loss
        torch.testing.assert_close(wrapper(x, labels=y, num_items_in_batch=count).loss, own)


def test_the_routers_fraction_is_counted_as_the_loss_is():
    """Micro-batches of answers of different lengths add up to the mean of their balancing losses over tokens."""
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, output_router_logits=True)
    config.router_aux_loss_coef = 1.0
    wrapper = MTPWrapper(MixtralForCausalLM(config), 4)
    tokens, labels, _ = draw_rows(5, rows=4, length=14, masked=0.6)
    counts = [(y[:, 1:] != -100).sum() for y in labels.split(1)]
    total, added, expected = sum(counts), 0.0, 0.0
    for x, y, count in zip(tokens.split(1), labels.split(1), counts, strict=True):
        with_it = wrapper(x, labels=y, num_items_in_batch=total)
        added += with_it.loss - wrapper(x, labels=y, num_items_in_batch=total, output_router_logits=False).loss
        expected += count / total * with_it.aux_loss
    assert len({int(count) for count in counts}) > 1
    torch.testing.assert_close(added, expected)


# Through transformers' trainer.


def answers(lengths: list[int], seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows of 12 tokens that end in an answer of each length."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        tokens = torch.randint(V, (12,), generator=generator)
        rows.append({"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(12) < 12 - length, -100)})
    return rows


LENGTHS = [1, 3, 1, 11, 2, 3, 5, 1, 7, 0, 1, 2]


def train(wrapper: MTPWrapper, folder: Any, rows: list[dict[str, Tensor]], **options: Any) -> Any:
    pytest.importorskip("accelerate")
    from mtp_ce import MTPTrainer

    arguments = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no",
        **{"learning_rate": 0.0, "num_train_epochs": 1, **options},
    )  # fmt: skip
    trainer = MTPTrainer(model=wrapper, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return trainer


@pytest.mark.parametrize("horizon", [1, 4, 8])
@pytest.mark.parametrize(("batch", "accumulated"), [(12, 1), (2, 3), (1, 12), (5, 2)])
def test_trainer_logs_ln_vocabulary_for_answers_of_any_length(horizon, batch, accumulated, tmp_path):
    """With four heads it was 9.1 for answers of three tokens, with eight 15.2, and 18.5 for one token."""
    trainer = train(
        wrap(horizon), tmp_path, answers(LENGTHS), per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([math.log(V)] * len(losses), rel=1e-5)


def test_gradients_are_the_same_for_any_micro_batches(tmp_path):
    norms = []
    for batch, accumulated in ((12, 1), (3, 4), (1, 12)):
        trainer = train(
            wrap(4, uniform=False), tmp_path, answers(LENGTHS), per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
        norms.append((entry["loss"], entry["grad_norm"]))
    assert norms[1:] == [pytest.approx(norms[0], rel=1e-5)] * 2


@pytest.mark.parametrize("kind", ["residual", "teacher_forcing"])
def test_eval_loss_is_the_mean_over_tokens_whatever_the_batches(kind, tmp_path):
    """transformers averages its batches' losses, so that an answer counts by the company it is in."""
    rows = answers(LENGTHS)
    wrapper = wrap(4, kind, uniform=False)
    whole = [torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")]
    with torch.no_grad():
        expected = wrapper(whole[0], labels=whole[1], return_stats=True)
    ce = expected.stats.ce
    for size in (1, 2, 5, 12):
        trainer = train(wrapper, tmp_path, rows, max_steps=1, per_device_eval_batch_size=size)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
        for h in range(4):
            mean = ce[:, :, h].sum() / expected.stats.live[:, :, h].sum()
            assert metrics[f"eval_ce_head_{h}"] == pytest.approx(mean.item(), rel=1e-5)
        with torch.no_grad():
            parts = zip(*(x.split(size) for x in whole), strict=True)
            batches = torch.stack([wrapper(tokens, labels=labels).loss for tokens, labels in parts])
        assert size == 12 or abs(batches.mean().item() - expected.loss.item()) > 1e-2, (
            "a mean of means would be another"
        )


@pytest.mark.parametrize("reduction", ["target", "live"])
def test_eval_loss_of_a_trainer_that_passes_no_count_is_weighed_by_the_losss_own(reduction, tmp_path, monkeypatch):
    rows = answers(LENGTHS)
    wrapper = wrap(4, uniform=False, head_reduction=reduction)
    whole = [torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")]
    with torch.no_grad():
        expected = wrapper(whole[0], labels=whole[1]).loss.item()
    trainer = train(wrapper, tmp_path, rows, max_steps=1, per_device_eval_batch_size=5)
    monkeypatch.setattr(trainer, "_get_num_items_in_batch", lambda *_: None)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_batch_whose_loss_is_not_finite_is_left_out_of_eval_loss_as_in_trainer(tmp_path):
    """`logging_nan_inf_filter`, of which the default is True."""
    rows = answers([4, 4, 4])
    rows[1]["token_weights"] = torch.full((12,), math.inf)
    rows[0]["token_weights"] = rows[2]["token_weights"] = torch.ones(12)
    for filtered in (True, False):
        trainer = train(
            wrap(3), tmp_path, rows[:1], max_steps=1, per_device_eval_batch_size=1, logging_nan_inf_filter=filtered
        )
        loss = trainer.evaluate(rows)["eval_loss"]
        assert loss == pytest.approx(math.log(V), rel=1e-5) if filtered else not math.isfinite(loss)


def test_rows_that_fill_up_the_last_batch_of_several_ranks_do_not_count(tmp_path, monkeypatch):
    """accelerate repeats rows of the beginning there, so that every rank has a batch of the same size."""
    trainer = train(wrap(2), tmp_path, answers([3, 3]), max_steps=1)
    labels = torch.arange(12).view(3, 4)

    class State:
        end_of_dataloader, remainder = True, 4

    accelerator = trainer.accelerator
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    monkeypatch.setattr(accelerator, "gradient_state", State())
    for rank, kept in ((0, 3), (1, 1)):
        monkeypatch.setattr(type(accelerator), "process_index", rank)
        masked = trainer._without_repeats({"labels": labels})["labels"]
        assert torch.equal(masked[:kept], labels[:kept])
        assert (masked[kept:] == -100).all()
    State.end_of_dataloader = False
    assert trainer._without_repeats({"labels": labels})["labels"] is labels


RANKS = """
import json, os, sys, torch
from transformers import TrainingArguments
sys.path.insert(0, os.environ["TESTS"])
from test_token_counts import LENGTHS, answers, wrap
from mtp_ce import MTPTrainer

size = int(os.environ.get("WORLD_SIZE", 1))
arguments = TrainingArguments(
    "out", report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=2, save_strategy="no", max_steps=2,
    learning_rate=1e-2, per_device_train_batch_size=4 // size, per_device_eval_batch_size=4 // size,
    train_sampling_strategy="sequential",
)
rows = answers(LENGTHS[:11])
trainer = MTPTrainer(model=wrap(4, uniform=False), args=arguments, train_dataset=rows[:8], eval_dataset=rows)
trainer.train()
trainer.evaluate()
if trainer.is_world_process_zero():
    with open(sys.argv[1], "w") as file:
        json.dump([trainer.state.log_history[0], trainer.state.log_history[-1]], file)
"""


@pytest.mark.slow
def test_two_ranks_log_what_one_does(tmp_path):
    """Losses, gradients and means of every head; eleven rows of evaluation are no multiple of the ranks' batches."""
    (tmp_path / "script.py").write_text(RANKS)
    environment = {**os.environ, "TESTS": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    logs = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command = [sys.executable, *launcher, "script.py", f"{len(logs)}.json"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=600)
        logs.append(json.loads((tmp_path / f"{len(logs)}.json").read_text()))
    for one, two in zip(*logs, strict=True):
        same = [name for name in one if not name.endswith(("time", "second"))]
        assert {name: two[name] for name in same} == pytest.approx({name: one[name] for name in same}, rel=1e-5)
    assert {"eval_loss", "eval_ce_head_3", "eval_agrees_head_1"} <= logs[1][1].keys()


def test_a_shift_of_labels_is_no_shift_of_the_count():
    tokens, labels, _ = draw_rows(7, rows=2, length=14, masked=0.5)
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    wrapper = wrap(4, uniform=False)
    torch.testing.assert_close(wrapper(tokens, shift_labels=shifted).loss, wrapper(tokens, labels=labels).loss)
