"""Memory layouts: nothing is copied into a convenient one, so every stride and every alignment must work."""

import pytest
import torch
from torch import Tensor

from mtp_ce import weighted_mtp_ce
from mtp_ce.kernels.backward import same_alignment
from mtp_ce.kernels.online_softmax import pack_heads
from mtp_ce.ops.logits import empty_gradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_every_integer_dtype(impl, draw, dtype: torch.dtype) -> None:
    """The same bits as int64."""
    logits, labels = draw.normal(2, 5, 2, 97), draw.integers(97, 2, 5)
    labels[0, 1] = 7
    wanted = weighted_mtp_ce(logits, labels, ignore_index=7, impl=impl)
    assert torch.equal(weighted_mtp_ce(logits, labels.to(dtype), ignore_index=7, impl=impl), wanted)


LABELS = {
    "every_other_column": lambda labels: torch.stack([labels, labels * 0 - 5], dim=-1)[..., 0],
    "transposed": lambda labels: labels.T.contiguous().T,
    "unaligned_int32": lambda labels: torch.cat([labels.new_zeros(1), labels.flatten()]).int()[1:].view_as(labels),
    "a_slice_of_longer_rows": lambda labels: torch.nn.functional.pad(labels, (3, 2), value=-7)[:, 3:-2],
    "reversed_batch": lambda labels: labels.flip(0).contiguous().flip(0),
}


@pytest.mark.parametrize("form", LABELS)
def test_labels_of_any_strides(impl, draw, form: str) -> None:
    """Strided, transposed, unaligned and sliced labels, bit for bit."""
    logits, labels = draw.normal(2, 5, 2, 97), draw.integers(97, 2, 5)
    view = LABELS[form](labels)
    assert torch.equal(view, labels)
    wanted = weighted_mtp_ce(logits, labels, weight_alignment="target", impl=impl)
    assert torch.equal(weighted_mtp_ce(logits, view, weight_alignment="target", impl=impl), wanted)


def test_one_row_of_labels_for_the_whole_batch(compare, draw) -> None:
    """Expanded labels: batch stride 0."""
    compare(draw.normal(3, 4, 2, 31), draw.integers(31, 1, 4).expand(3, 4), draw.normal(3, 4))


def from_memory(draw, order: tuple[int, ...], dtype: torch.dtype, shape=(2, 4, 3, 101)) -> Tensor:
    """Logits [B,S,H,V] whose memory holds the dimensions in `order`."""
    back = [order.index(d) for d in range(4)]
    return draw.normal(*(shape[d] for d in order), dtype=dtype, scale=2).permute(back)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "order",
    [(0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2), (3, 0, 1, 2)],
    ids=["heads_outside_positions", "heads_first", "sequence_first", "vocabulary_before_heads", "vocabulary_first"],
)
def test_permuted_logits(compare, draw, order, dtype: torch.dtype) -> None:
    """The last two have a vocabulary stride other than 1."""
    got = compare(from_memory(draw, order, dtype), draw.integers(101, 2, 4), draw.normal(2, 4))
    assert got.d_logits[0].shape == (2, 4, 3, 101)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_a_list_of_heads_is_their_stack(impl, draw, evaluate) -> None:
    """Bit for bit, list or tuple; the gradients come one by one, none for the stack is ever made."""
    V = 104  # whole 16-byte vectors: the rows of the list are cut, and summed, as those of the stack
    logits, labels, weights = draw.normal(2, 4, 3, V), draw.integers(V, 2, 4), draw.normal(2, 4)
    whole = evaluate(impl, logits, labels, weights)
    for collection in (list, tuple):
        parts = evaluate(impl, collection(head.contiguous() for head in logits.unbind(2)), labels, weights)
        assert torch.equal(parts.loss, whole.loss)
        assert torch.equal(parts.d_token_weights, whole.d_token_weights)
        assert torch.equal(torch.stack(parts.d_logits, dim=2), whole.d_logits[0])
        assert torch.equal(parts.stats.ce, whole.stats.ce)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_different_layouts(compare, draw, dtype: torch.dtype) -> None:
    """Contiguous, transposed, a slice of wider rows, expanded over the batch; then one with a vocabulary stride."""
    heads = [
        draw.normal(2, 4, 101, dtype=dtype),
        draw.normal(4, 2, 101, dtype=dtype).transpose(0, 1),
        draw.normal(2, 4, 120, dtype=dtype)[..., 3:104],
        draw.normal(1, 4, 101, dtype=dtype).expand(2, 4, 101),
    ]
    compare(heads, draw.integers(101, 2, 4), draw.normal(2, 4))
    heads[1] = draw.normal(2, 101, 4, dtype=dtype).transpose(1, 2)
    compare(heads, draw.integers(101, 2, 4), draw.normal(2, 4))


def test_three_dimensions_mean_one_head(impl, draw, evaluate) -> None:
    """[B,S,V], [B,S,1,V] and [one tensor] are the same thing."""
    logits, labels = draw.normal(2, 4, 55), draw.integers(55, 2, 4)
    plain, with_head, listed = (evaluate(impl, x, labels) for x in (logits, logits[:, :, None], [logits]))
    assert torch.equal(plain.loss, with_head.loss)
    assert torch.equal(plain.loss, listed.loss)
    assert plain.d_logits[0].shape == (2, 4, 55)
    assert torch.equal(plain.d_logits[0], with_head.d_logits[0][:, :, 0])


def test_the_same_tensor_as_two_heads(compare, draw) -> None:
    """One output scored against two tokens: its gradients add up in autograd."""
    head = draw.normal(2, 4, 55)
    compare([head, head], draw.integers(55, 2, 4))


def test_logits_expanded_over_heads(compare, draw) -> None:
    """Head stride 0: read in place; each head gets its own gradient."""
    compare(draw.normal(2, 4, 1, 55).expand(2, 4, 3, 55), draw.integers(55, 2, 4))


def shifted(draw, dtype: torch.dtype, past: int, width: int, V: int) -> Tensor:
    """Logits [1,4,1,V] in rows of `width`, starting `past` elements behind a 16-byte boundary."""
    memory = draw.normal(4 * width + past, dtype=dtype, scale=2)
    assert memory.data_ptr() % 16 == 0
    return memory[past:].view(1, 4, 1, width)[..., :V]


MEMORY_SHAPE = (2, 4, 3, 1001)


def memory_layouts(new) -> dict[str, Tensor]:
    """Logits [B,S,H,V] of every kind of memory, made by new(*shape)."""
    B, S, H, V = MEMORY_SHAPE
    return {
        "contiguous": new(B, S, H, V),
        "heads_first": new(H, B, S, V).permute(1, 2, 0, 3),
        "padded": new(B, S, H, V + 7)[..., :V],
        "padded_heads_first": new(H, B, S, V + 7).permute(1, 2, 0, 3)[..., :V],
        "without_first_entries": new(B, S, H, V + 3)[..., 3:],
        "past_a_boundary": new(B * S * H * V + 5)[5:].view(B, S, H, V),
        "every_other_position": new(B, 2 * S, H, V)[:, 1::2],
        "expanded_over_heads": new(B, S, 1, V).expand(B, S, H, V),
        "expanded_over_the_batch": new(1, S, H, V + 3)[..., 2:-1].expand(B, S, H, V),
        "one_head": new(B, S, V + 1)[:, :, None, 1:].expand(B, S, H, V),
    }


def test_the_gradient_stands_against_16_bytes_as_the_logits_do() -> None:
    """So that every row is loaded and stored in the same whole vectors; in rows of its own, hardly further apart."""
    B, S, H, _ = MEMORY_SHAPE
    for name, logits in memory_layouts(lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)).items():
        gradient = empty_gradient(logits)
        assert gradient.shape == logits.shape, name
        assert same_alignment(pack_heads([logits]), pack_heads([gradient]), 8), name
        numbered = torch.arange(logits.numel()).view(logits.shape) % 256  # exact in bf16
        assert torch.equal(gradient.copy_(numbered), numbered), name
        assert gradient.untyped_storage().nbytes() <= 2 * logits.numel() + 16 * (B * S * H + B * S + B + 1), name
        if name in ("contiguous", "heads_first"):
            assert gradient.stride() == logits.stride(), name


ALIGNMENTS = [(torch.float32, past) for past in range(4)] + [(torch.bfloat16, past) for past in range(8)]
ROWS = [(507, 507), (520, 512), (1030, 1029)]


@pytest.mark.parametrize("impl", ["triton"])  # the kernels cut rows by alignment; torch's own operators do the rest
@pytest.mark.parametrize(("dtype", "past"), ALIGNMENTS)
@pytest.mark.parametrize(("width", "V"), ROWS)
def test_rows_at_every_alignment(draw, compare, dtype, past: int, width: int, V: int) -> None:
    """Bases at every place against 16 bytes, odd and even row strides; labels in the first and last elements.

    A row is cut in front edge, body of whole vectors and back edge.
    """
    labels = torch.tensor([[0, V - 1, 2, V - 2]], device=draw.integers(1, 1).device)
    options = {"z_loss": 0.01 * (past % 2), "label_smoothing": 0.1 * (past // 2 % 2)}
    compare(shifted(draw, dtype, past, width, V), labels, shift=0, **options)


@pytest.mark.parametrize("impl", ["triton"])  # the kernels cut rows by alignment; torch's own operators do the rest
@pytest.mark.parametrize(("dtype", "past"), ALIGNMENTS)
@pytest.mark.parametrize(("width", "V"), ROWS)
def test_rows_at_every_alignment_in_place(impl, draw, dtype, past: int, width: int, V: int) -> None:
    """Bit for bit the gradient out of place, and nothing beside the rows is overwritten."""
    logits = shifted(draw, dtype, past, width, V)
    labels = torch.tensor([[0, V - 1, 2, V - 2]], device=logits.device)
    leaf = logits.detach().requires_grad_()
    (expected,) = torch.autograd.grad(weighted_mtp_ce(leaf, labels, shift=0, impl=impl), leaf)
    memory = torch.as_strided(logits, (4 * width + past,), (1,), 0)
    before = memory.clone()
    output = Alias.apply(logits, torch.zeros((), device=logits.device, requires_grad=True))
    weighted_mtp_ce(output, labels, shift=0, inplace_backward=True, impl=impl).backward()
    assert torch.equal(logits, expected)
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside[past:].view(1, 4, 1, width)[..., :V] = False
    assert torch.equal(memory[outside], before[outside])


class Alias(torch.autograd.Function):
    """Memory of any layout as if a layer had returned it: a leaf must not be overwritten."""

    @staticmethod
    def forward(ctx, memory: Tensor, parameter: Tensor) -> Tensor:
        return memory.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.new_zeros(())


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [1, 2, 3, 8])
def test_a_vocabulary_that_leaves_out_its_first_entries(compare, draw, dtype, start: int) -> None:
    """x[..., 1:]: the base is unaligned, the row stride is not the row's length."""
    compare(draw.normal(2, 3, 2, 300, dtype=dtype)[..., start:], draw.integers(300 - start, 2, 3), softcap=4.0)


def test_a_slice_of_a_longer_batch_and_sequence(compare, draw) -> None:
    """Every other sequence, without its first and last token, of the even heads."""
    logits = draw.normal(4, 6, 4, 77)[::2, 1:-1, ::2]
    compare(logits, draw.integers(77, 4, 6)[::2, 1:-1], draw.normal(4, 6)[::2, 1:-1])
