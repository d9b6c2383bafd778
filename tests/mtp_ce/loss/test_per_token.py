"""head_reduction="target": every predicted token counts once, however few heads and positions can predict it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ce import weighted_mtp_ce

V = 19


def answers(draw, lengths: list[int], S: int = 10) -> Tensor:
    """A row of labels for each answer, which stands at its end; the prompt before it is masked."""
    labels = draw.integers(V, len(lengths), S)
    for b, length in enumerate(lengths):
        labels[b, : S - length] = -100
    return labels


@pytest.mark.parametrize("H", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("masked_by", ["prompt", "holes", "documents", "interleaved_documents", "lengths", "nothing"])
@pytest.mark.pairwise
def test_every_predicted_token_has_weight_1(impl, device, draw, masked_by: str, H: int) -> None:
    """Uniform logits cost ln V a row, so that d loss / d w of a token is its share of the mean times ln V."""
    labels, options = answers(draw, [1, 3, 8]), {}
    B, S = labels.shape
    if masked_by != "prompt":
        labels = draw.integers(V, B, S)
    if masked_by == "holes":
        labels[draw.uniform(B, S) < 0.6] = -100
    elif masked_by == "documents":
        options["document_ids"] = draw.integers(5, B, S).sort(dim=1).values
    elif masked_by == "interleaved_documents":
        options["document_ids"] = draw.integers(3, B, S)
    elif masked_by == "lengths":
        options["seq_lens"] = torch.tensor([1, 6, S], device=device)
    weights = torch.ones(B, S, device=device, requires_grad=True)
    loss, stats = weighted_mtp_ce(
        torch.zeros(B, S, H, V, device=device), labels, weights, weight_alignment="target", head_reduction="target",
        impl=impl, return_stats=True, **options,
    )  # fmt: skip
    loss.backward()
    predicted = torch.zeros(B, S + H, dtype=torch.bool, device=device)
    for h in range(H):
        predicted[:, 1 + h : 1 + h + S] |= stats.live[:, :, h]
    predicted = predicted[:, :S]
    assert loss.item() == pytest.approx(math.log(V), rel=1e-6)
    share = predicted / predicted.sum()
    torch.testing.assert_close(weights.grad, share * math.log(V), rtol=1e-5, atol=0)
    if masked_by in ("prompt", "holes", "nothing", "lengths"):
        # What a causal language model is trained on: transformers counts the same tokens.
        length = options.get("seq_lens", torch.full((B,), S, device=device))[:, None]
        supervised = (labels != -100) & (torch.arange(S, device=device) < length)
        assert torch.equal(predicted[:, 1:], supervised[:, 1:])


@pytest.mark.parametrize("reduction", ["live", "target"])
def test_one_head_is_the_causal_loss(impl, draw, reduction: str) -> None:
    """The cross entropy of shifted logits over next-token targets, masked prompts included."""
    labels = answers(draw, [1, 3, 8])
    logits = draw.normal(*labels.shape, 1, V).requires_grad_()
    loss = weighted_mtp_ce(logits, labels, head_reduction=reduction, impl=impl)
    causal = F.cross_entropy(logits[:, :-1, 0].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, causal, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, causal))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_a_short_answer_is_not_counted_for_every_head(impl, device, draw) -> None:
    """Four positions see the one token of an answer: "live" over a count of tokens makes it 4 times the loss."""
    labels = answers(draw, [1])
    logits, count = torch.zeros(1, 10, 4, V, device=device), 1.0
    live, target = (
        weighted_mtp_ce(logits, labels, normalizer=count, head_reduction=name, impl=impl).item()
        for name in ("live", "target")
    )
    assert live == pytest.approx(4 * math.log(V), rel=1e-6)
    assert target == pytest.approx(math.log(V), rel=1e-6)


@pytest.mark.parametrize("H", [1, 4])
def test_micro_batches_add_up_to_the_batch(impl, draw, H: int) -> None:
    """With the count of next-token targets as the normalizer, for any grouping of rows; loss and gradient."""
    labels = answers(draw, [1, 0, 5, 3], S=6)
    logits = draw.normal(*labels.shape, H, V).requires_grad_()
    count = (labels[:, 1:] != -100).sum().float()
    whole = weighted_mtp_ce(logits, labels, head_reduction="target", impl=impl)
    (d_whole,) = torch.autograd.grad(whole, logits)
    for sizes in ([1] * 4, [3, 1]) if impl == "cpu" else ([1, 3],):  # Triton's interpreter is slow
        parts = [
            weighted_mtp_ce(x, y, head_reduction="target", normalizer=count, impl=impl)
            for x, y in zip(logits.split(sizes), labels.split(sizes), strict=True)
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)
        (d_parts,) = torch.autograd.grad(sum(parts), logits)
        torch.testing.assert_close(d_parts, d_whole, rtol=1e-5, atol=1e-8)


def test_weights_of_heads_are_averaged_over_those_that_predict_the_token(impl, device, draw, compare) -> None:
    """Head 1 counts for nothing: tokens that only it could predict take no gradient, the others are head 0's."""
    labels = answers(draw, [2, 6, 8])
    logits = draw.normal(*labels.shape, 2, V)
    a = torch.tensor([1.0, 0.0], device=device)
    compare(logits, labels, head_weights=a, head_reduction="target")
    both = weighted_mtp_ce(logits, labels, head_weights=a, head_reduction="target", impl=impl)
    first = weighted_mtp_ce(logits[:, :, :1], labels, head_reduction="target", impl=impl)
    torch.testing.assert_close(both, first, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", [0, 2, 20])
def test_tokens_that_no_head_predicts_are_not_counted(compare, draw, shift: int) -> None:
    """Shifts at the edge of a sequence; 0 predicts its first token, 20 none."""
    labels = answers(draw, [1, 3, 8])
    compare(draw.normal(*labels.shape, 3, V), labels, draw.uniform(*labels.shape), head_reduction="target", shift=shift)
