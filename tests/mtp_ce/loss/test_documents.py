"""Packing and padding: document ids and sequence lengths."""

import pytest
import torch

from mtp_ce import weighted_mtp_ce

V = 41


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_a_head_never_predicts_a_token_of_another_document(impl, device, draw, dtype: torch.dtype) -> None:
    """Live just where the target carries the position's own id, also where an id comes back later."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 0], [5, 5, 3, 3, 3, 3, 3]], dtype=dtype, device=device)
    labels = draw.integers(V, 2, 7)
    _, stats = weighted_mtp_ce(draw.normal(2, 7, 3, V), labels, document_ids=documents, impl=impl, return_stats=True)
    for b in range(2):
        for t in range(7):
            wanted = [t + 1 + h < 7 and bool(documents[b, t] == documents[b, t + 1 + h]) for h in range(3)]
            assert stats.live[b, t].tolist() == wanted, (b, t)


@pytest.mark.parametrize("alignment", ["position", "target"])
def test_documents_in_one_row(compare, draw, device, alignment: str) -> None:
    """Documents longer and shorter than the horizon, negative ids, ids that are no whole tensor of memory."""
    ids = torch.tensor([[-1, 7], [-1, 7], [-1, 7], [4, -9], [4, 2], [0, 2], [0, 2]], device=device).T
    labels = draw.integers(V, 2, 7)
    labels[1, 5] = -100
    compare(draw.normal(2, 7, 3, V), labels, draw.normal(2, 7), document_ids=ids, weight_alignment=alignment)


@pytest.mark.parametrize("alignment", ["position", "target"])
def test_packed_is_unpacked(impl, draw, device, alignment: str) -> None:
    """Three documents in one row cost what they cost in rows of their own; so do their gradients."""
    lengths = [4, 1, 6]
    logits, labels, weights = draw.normal(1, 11, 2, V), draw.integers(V, 1, 11), draw.uniform(1, 11)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].to(device)

    def run(x, y, w, **options):
        leaf, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = weighted_mtp_ce(leaf, y, w, weight_alignment=alignment, reduction="none", impl=impl, **options)
        return loss.detach(), *torch.autograd.grad(loss.sum(), (leaf, w))

    packed = run(logits, labels, weights, document_ids=ids)
    pieces = zip(*(tensor.split(lengths, dim=1) for tensor in (logits, labels, weights)), strict=True)
    unpacked = [torch.cat(parts, dim=1) for parts in zip(*(run(*piece) for piece in pieces), strict=True)]
    for whole, parts in zip(packed, unpacked, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-7)


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("alignment", ["position", "target"])
def test_seq_lens_are_ignored_labels(impl, draw, device, dtype: torch.dtype, alignment: str) -> None:
    """Bit for bit, lengths 0, 1, S and between; whatever the padding's labels are."""
    S = 6
    lens = torch.tensor([0, 1, 4, S], dtype=dtype, device=device)
    logits, labels, weights = draw.normal(4, S, 2, V), draw.integers(V, 4, S), draw.uniform(4, S)
    ignored = torch.where(torch.arange(S, device=device) < lens[:, None], labels, -100)
    labels = torch.where(torch.arange(S, device=device) < lens[:, None], labels, V + 12345)  # no class at all
    results = []
    for y, options in ((labels, {"seq_lens": lens}), (ignored, {})):
        leaf, w = logits.clone().requires_grad_(), weights.clone().requires_grad_()
        loss, stats = weighted_mtp_ce(leaf, y, w, weight_alignment=alignment, impl=impl, return_stats=True, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, (leaf, w)), *stats))
    for with_lens, with_labels in zip(*results, strict=True):
        assert torch.equal(with_lens, with_labels)


def test_seq_lens_that_are_a_strided_view(compare, draw) -> None:
    """Every other entry of a longer vector."""
    lens = draw.integers(6, 4, dtype=torch.int32)[::2]
    compare(draw.normal(2, 5, 2, V), draw.integers(V, 2, 5), seq_lens=lens)


def test_padding_and_documents_together(compare, draw, device) -> None:
    """A target must be inside the length, of the same document and not ignored: all three."""
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]], device=device)
    labels = draw.integers(V, 2, 7)
    labels[0, 4] = labels[1, 1] = 3
    got = compare(
        draw.normal(2, 7, 2, V), labels, document_ids=ids, ignore_index=3, shift=0,
        seq_lens=torch.tensor([6, 3], device=device),
    )  # fmt: skip
    assert int(got.stats.live.sum()) > 0
