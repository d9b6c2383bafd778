"""The loss on hidden states is the loss on their logits: every option, every edge, and transformers' own loss."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ce import MTPLoss, MTPStats, weighted_mtp_ce, weighted_mtp_linear_ce

B, S, H, D, V = 2, 6, 3, 16, 45
IMPLEMENTATIONS = ["reference", "cpu", "triton"]


def batch(draw, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, unembed, labels with a hole, weights with a zero."""
    labels, weights = draw.integers(V, B, S), draw.normal(B, S)
    labels[0, 2], weights[1, 1] = -100, 0.0
    return draw.normal(B, S, H, D, dtype=dtype), draw.normal(V, D, scale=0.5, dtype=dtype), labels, weights


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shift_0": {"shift": 0},
    "shift_2": {"shift": 2},
    "target": {"weight_alignment": "target"},
    "horizon": {"head_reduction": "horizon"},
    "per_token": {"head_reduction": "target", "head_weights": torch.tensor([1.0, 0.0, 0.5])},
    "head_weights": {"head_weights": torch.tensor([1.0, 0.0, 0.5])},
    "seq_lens": {"seq_lens": torch.tensor([4, 6])},
    "document_ids": {"document_ids": torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 0, 0]])},
    "ignore_index": {"ignore_index": 7},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "normalizer": {"normalizer": 17.0},
    "normalizer_tensor": {"normalizer": torch.tensor(17.0)},
    "loss_scale": {"loss_scale": -0.25},
    "softcap": {"softcap": 2.0},
    "z_loss": {"z_loss": 0.1},
    "label_smoothing": {"label_smoothing": 0.2},
    "everything": {
        "softcap": 5.0, "z_loss": 0.01, "label_smoothing": 0.1, "weight_alignment": "target", "loss_scale": 2.0,
        "shift": 0, "reduction": "none", "seq_lens": torch.tensor([4, 6]), "head_reduction": "horizon",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("impl", "name"),
    [("reference", "everything"), *((impl, name) for impl in ("cpu", "triton") for name in OPTIONS)],
)
def test_it_is_the_loss_of_the_logits(impl, draw, device, name: str) -> None:
    """Loss, statistics and every gradient of weighted_mtp_ce(hidden @ unembed.T + bias), option by option."""
    tensors = batch(draw)
    labels = tensors[2].masked_fill_(tensors[2] == -100, OPTIONS[name].get("ignore_index", -100))
    options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in OPTIONS[name].items()}
    results = []
    for path in ("logits", "linear"):
        x, unembed, w = (tensors[i].clone().requires_grad_() for i in (0, 1, 3))
        bias = None if name == "plain" else torch.linspace(-1, 1, V, device=device).requires_grad_()
        if path == "logits":
            logits = F.linear(x, unembed, bias)
            loss, stats = weighted_mtp_ce(logits, labels, w, impl=impl, return_stats=True, **options)
        else:
            loss, stats = weighted_mtp_linear_ce(
                x, unembed, labels, w, bias=bias, impl=impl, return_stats=True, chunk_bytes=5 * V * 4, **options
            )
        leaves = [x, unembed, w] + ([] if bias is None else [bias])
        upstream = torch.linspace(-1, 2, loss.numel(), device=device).view_as(loss) if loss.dim() else None
        results.append((loss.detach(), *stats, *torch.autograd.grad(loss, leaves, upstream)))
    assert bool(results[0][0].abs().sum() > 0)
    for through_logits, straight in zip(*results, strict=True):
        torch.testing.assert_close(straight, through_logits, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_have_the_documented_shapes_and_dtypes(impl, draw, dtype: torch.dtype) -> None:
    """Loss and ce in fp32 whatever hidden is; statistics detached; no statistics unless asked for."""
    hidden, unembed, labels, weights = batch(draw, dtype)
    result = weighted_mtp_linear_ce(hidden.requires_grad_(), unembed, labels, weights, impl=impl, return_stats=True)
    assert isinstance(result, MTPLoss)
    assert isinstance(result.stats, MTPStats)
    wanted = {"ce": torch.float32, "live": torch.bool, "lse": torch.float32, "top1": torch.int32}
    for name, kind in wanted.items():
        value = getattr(result.stats, name)
        assert value.shape == (B, S, H), name
        assert value.dtype == kind, name
        assert value.is_contiguous(), name
        assert not value.requires_grad, name
    assert result.loss.dtype == torch.float32
    assert result.loss.requires_grad
    alone = weighted_mtp_linear_ce(hidden, unembed, labels, weights, impl=impl)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, result.loss)


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("V", [1, 2, 127, 507, 1000, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vocabularies_on_and_off_the_edge_of_a_tile(compare, draw, V: int, dtype: torch.dtype) -> None:
    """Labels in the first and the last entry; V = 1 costs nothing."""
    labels = torch.tensor([[V // 2, 0, V - 1]], device=draw.integers(1, 1).device)
    hidden, unembed = draw.normal(1, 3, 2, 8, dtype=dtype), draw.normal(V, 8, dtype=dtype)
    got = compare(hidden, labels, draw.normal(1, 3), unembed=unembed, bias=draw.normal(V, dtype=dtype))
    assert V > 1 or not (bool(got.loss != 0) or bool(got.d_hidden[0].any()))
    compare(hidden, labels, unembed=unembed, softcap=0.3, z_loss=0.02, label_smoothing=0.1)


@pytest.mark.pairwise
@pytest.mark.parametrize(("length", "heads"), [(1, 1), (1, 4), (2, 5), (3, 3)])
@pytest.mark.parametrize("shift", [0, 1])
def test_sequences_shorter_than_the_horizon(compare, draw, length: int, heads: int, shift: int) -> None:
    """S = 1 with shift = 1 has no target at all; with shift = 0 it has one."""
    got = compare(
        draw.normal(2, length, heads, D), draw.integers(V, 2, length), draw.uniform(2, length),
        unembed=draw.normal(V, D), shift=shift,
    )  # fmt: skip
    assert got.stats.live.sum() == 2 * sum(t + shift + h < length for t in range(length) for h in range(heads))


EMPTY: dict[str, Any] = {
    "all_ignored": lambda labels: {},
    "seq_lens_0": lambda labels: {"seq_lens": torch.zeros(len(labels), dtype=torch.int64, device=labels.device)},
    "shift_beyond_the_sequence": lambda labels: {"shift": labels.shape[1] + 3},
    "documents_of_one_token": lambda labels: {
        "document_ids": torch.arange(labels.numel(), device=labels.device).view_as(labels)
    },
}


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("reason", EMPTY)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("drop", [True, False, 0, 7])
def test_no_valid_row_returns_exactly_zero_and_zero_gradients(
    impl, device, draw, reason: str, reduction: str, drop: bool | int
) -> None:
    """Never NaN, also with NaN hidden states; and the loss stays connected, so that every rank can run backward."""
    labels = draw.integers(V, B, S)
    if reason == "all_ignored":
        labels.fill_(-100)
    hidden = torch.full((B, S, H, D), torch.nan, device=device, requires_grad=True)
    unembed, bias = draw.normal(V, D).requires_grad_(), draw.normal(V).requires_grad_()
    weights = draw.uniform(B, S).requires_grad_()
    loss, stats = weighted_mtp_linear_ce(
        hidden, unembed, labels, weights, bias=bias, reduction=reduction, z_loss=0.1, label_smoothing=0.1,
        loss_scale=-3.0, drop_dead_rows=drop, impl=impl, return_stats=True, **EMPTY[reason](labels),
    )  # fmt: skip
    assert loss.shape == ((B, S) if reduction == "none" else ())
    assert bool((loss == 0).all())
    assert not bool(stats.live.any())
    for gradient in torch.autograd.grad(loss.sum(), (hidden, unembed, bias, weights)):
        assert bool((gradient == 0).all())


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 5, 2, 7), (2, 0, 2, 7), (0, 0, 1, 7)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("drop", [True, False, 3])
@pytest.mark.parametrize("several", [False, True])
def test_an_empty_batch_returns_zero(
    impl, device, draw, shape, reduction: str, drop: bool | int, several: bool
) -> None:
    """B = 0 and S = 0: loss 0 (or an empty one), connected; gradients of the right shapes, of unembed all 0."""
    batch_size, length, heads, _ = shape
    whole = torch.empty(shape, device=device)
    given = [x.contiguous().requires_grad_() for x in (whole.unbind(2) if several else [whole])]
    unembed = draw.normal(V, 7).requires_grad_()
    loss, stats = weighted_mtp_linear_ce(
        given if several else given[0], unembed, torch.empty(batch_size, length, dtype=torch.int64, device=device),
        reduction=reduction, drop_dead_rows=drop, impl=impl, return_stats=True,
    )  # fmt: skip
    assert loss.shape == ((batch_size, length) if reduction == "none" else ())
    assert loss.sum().item() == 0
    assert all(value.shape == (batch_size, length, heads) for value in stats)
    *d_hidden, d_unembed = torch.autograd.grad(loss.sum(), (*given, unembed))
    assert [x.shape for x in d_hidden] == [x.shape for x in given]
    assert bool((d_unembed == 0).all())


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_random_tokens_cost_at_least_ln_v(impl, draw) -> None:
    """A head that copies its input token, sure of itself, never beats ln V on independent uniform tokens."""
    vocabulary, length = 16, 40
    labels = draw.integers(vocabulary, 1, length)
    hidden = F.one_hot(labels, vocabulary).float()[:, :, None].expand(1, length, 2, vocabulary)
    unembed = 8 * torch.eye(vocabulary, device=labels.device)
    _, stats = weighted_mtp_linear_ce(hidden, unembed, labels, impl=impl, return_stats=True)
    assert min(stats.ce[:, :, h][stats.live[:, :, h]].mean().item() for h in range(2)) > math.log(vocabulary)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_micro_batches_equal_one_batch(impl, draw) -> None:
    """Under the global count as normalizer, loss and gradients add up."""
    hidden, unembed, labels, weights = batch(draw)
    count = weighted_mtp_linear_ce(hidden, unembed, labels, impl=impl, return_stats=True).stats.live.any(-1).sum()
    x, u = hidden.clone().requires_grad_(), unembed.clone().requires_grad_()
    whole = weighted_mtp_linear_ce(x, u, labels, weights, impl=impl)
    whole.backward()
    y, v = hidden.clone().requires_grad_(), unembed.clone().requires_grad_()
    parts = [
        weighted_mtp_linear_ce(y[i : i + 1], v, labels[i : i + 1], weights[i : i + 1], normalizer=count, impl=impl)
        for i in range(B)
    ]
    sum(parts).backward()
    for ours, wanted in ((sum(parts), whole), (y.grad, x.grad), (v.grad, u.grad)):
        torch.testing.assert_close(ours, wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_head_of_weight_one_is_the_loss_that_a_llama_reports(impl, device, draw) -> None:
    """last_hidden_state and lm_head.weight: the loss and the gradient of every parameter, to the last digits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    input_ids = draw.integers(97, 2, 8)
    labels = input_ids.clone()
    labels[0, :3] = -100
    theirs = model(input_ids=input_ids, labels=labels).loss
    theirs.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    hidden = model.model(input_ids=input_ids).last_hidden_state
    ours = weighted_mtp_linear_ce(hidden, model.lm_head.weight, labels, impl=impl)
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert "model.embed_tokens.weight" in wanted  # tied: the sum of both uses
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
