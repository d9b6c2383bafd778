"""Every head scored on text: against the loss's own statistics, and against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper
from mtp_ce.training.data.rows import Batch, PackedRows
from mtp_ce.training.metrics import head_scores
from mtp_ce.training.metrics.head_scores import HeadResult, score_heads, validation_metrics

V = 40


def model_of(heads: str, horizon: int = 3) -> MTPWrapper:
    """A random model whose heads all differ."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    wrapper = MTPWrapper(LlamaForCausalLM(LlamaConfig(vocab_size=V, initializer_range=0.3, **sizes)), horizon, heads)
    with torch.no_grad():
        for parameter in wrapper.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return wrapper.eval()


def batches_of(rows: int = 12) -> list[Batch]:
    """Packed documents of uneven lengths, some rows padded, batches of uneven sizes."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(V, (length,), generator=generator) for length in (30, 2, 9, 55, 1, 40, 31)]
    return list(PackedRows(documents, 16, pad_id=0).in_order(5))


@pytest.mark.parametrize("heads", ["residual", "layer", "sequential", "teacher_forcing"])
def test_scores_are_those_of_the_loss(heads, monkeypatch):
    """Cross entropy and top-1 come from logits here and from the fused statistics there."""
    monkeypatch.setitem(head_scores.CHUNK_ROWS, "cpu", 7)
    model, batches = model_of(heads), batches_of()
    ce, hits, rows = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    for batch in batches:
        stats = model(
            batch.input_ids, position_ids=batch.position_ids, labels=batch.labels,
            document_ids=batch.document_ids, return_stats=True,
        ).stats  # fmt: skip
        ce += stats.ce.sum((0, 1)).detach()
        rows += stats.live.sum((0, 1))
        for h in range(3):
            future = torch.nn.functional.pad(batch.labels[:, h + 1 :], (0, h + 1), value=-1)
            hits[h] += ((stats.top1[..., h] == future) & stats.live[..., h]).sum()
    results = score_heads(model, batches)
    assert [result.ce for result in results] == pytest.approx((ce / rows).tolist(), rel=1e-5)
    assert [result.top1 for result in results] == pytest.approx((hits / rows).tolist())
    assert [result.rows for result in results] == rows.tolist()
    assert all(result.top1 < result.top5 < 1 for result in results)
    assert [result.agrees is None for result in results] == [False] + [heads == "teacher_forcing"] * 2


def test_agreement_counts_positions_at_which_all_heads_so_far_say_what_head_0_says_later():
    """By hand, position by position, from the logits of all heads."""
    model, batches = model_of("residual"), batches_of()
    with torch.no_grad():
        for block in model.heads.blocks:
            block.weight.mul_(0.1)  # so near to head 0 that some guesses are right
    agreed, rows = [0, 0, 0], [0, 0, 0]
    top5 = 0
    for batch in batches:
        logits = model.head_logits(input_ids=batch.input_ids, position_ids=batch.position_ids)
        said = [head.argmax(-1).tolist() for head in logits]
        for b, (labels, documents) in enumerate(zip(batch.labels.tolist(), batch.document_ids.tolist(), strict=True)):
            for t in range(len(labels)):
                right = True
                for h in range(3):
                    target = t + 1 + h
                    if target >= len(labels) or labels[target] == -100 or documents[target] != documents[t]:
                        continue
                    rows[h] += 1
                    right = right and said[h][b][t] == said[0][b][t + h]
                    agreed[h] += right
                    if h == 1:
                        top5 += labels[target] in logits[1][b, t].topk(5).indices.tolist()
    results = score_heads(model, batches)
    assert [result.agrees for result in results] == pytest.approx([a / r for a, r in zip(agreed, rows, strict=True)])
    assert results[1].top5 == pytest.approx(top5 / rows[1])
    assert agreed[0] == rows[0], "head 0 agrees with itself"
    assert 0 < agreed[1] < rows[1], "or this shows nothing"


def test_sums_are_where_the_model_computes_and_not_where_its_parameters_wait(monkeypatch):
    """Parameters that are offloaded say that they are on another device than hidden states and batches."""
    model, batches = model_of("residual"), batches_of()
    expected, added = score_heads(model, batches), []
    monkeypatch.setattr(MTPWrapper, "device", property(lambda model: torch.device("meta")))
    assert score_heads(model, batches, lambda sums: added.append(sums.device.type)) == expected
    assert added == ["cpu"]


def test_no_rows_at_all_are_no_result_and_not_a_division_by_0():
    batch = batches_of()[0]
    nothing = Batch(batch.input_ids, torch.full_like(batch.labels, -100), batch.document_ids, batch.position_ids)
    results = score_heads(model_of("residual"), [nothing])
    assert results == [HeadResult(None, None, None, None, 0)] * 3
    assert results[0].perplexity is None
    metrics = validation_metrics(results)
    assert metrics.keys() >= {"val/ce_mean", "val/ce_head_2", "val/perplexity_head_0", "val/top1_head_1"}
    assert all(math.isnan(value) for value in metrics.values())


@pytest.mark.parametrize(("ce", "perplexity"), [(0.0, 1.0), (1.0, math.e), (1e4, math.inf), (None, None)])
def test_a_perplexity_that_overflows_is_infinite(ce, perplexity):
    assert HeadResult(ce=ce, top1=0.0, top5=0.0, agrees=None, rows=1).perplexity == perplexity
