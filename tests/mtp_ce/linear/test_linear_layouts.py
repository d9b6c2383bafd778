"""Memory layouts of hidden, unembed and bias: every stride works, and a list of heads is their stack."""

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, S, H, D, V = 2, 4, 3, 10, 53


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "order",
    [(0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0)],
    ids=["heads_outside_positions", "heads_first", "sequence_first", "features_before_heads", "features_first"],
)
def test_permuted_hidden_states(compare, draw, order: tuple[int, ...], dtype: torch.dtype) -> None:
    """The gradient has the shape of what was given, whatever its memory."""
    shape = (B, S, H, D)
    hidden = draw.normal(*(shape[d] for d in order), dtype=dtype).permute([order.index(d) for d in range(4)])
    assert hidden.shape == shape
    assert not hidden.is_contiguous()
    got = compare(
        hidden, draw.integers(V, B, S), draw.normal(B, S), unembed=draw.normal(V, D, dtype=dtype),
        chunk_bytes=7 * V * dtype.itemsize,
    )  # fmt: skip
    assert got.d_hidden[0].shape == shape


UNEMBED = {
    "transposed": lambda draw, dtype: draw.normal(D, V, dtype=dtype).T,
    "first_rows_of_a_padded_one": lambda draw, dtype: draw.normal(V + 11, D, dtype=dtype)[:V],
    "columns_of_a_wider_one": lambda draw, dtype: draw.normal(V, D + 3, dtype=dtype)[:, 1 : D + 1],
    "every_other_row": lambda draw, dtype: draw.normal(2 * V, D, dtype=dtype)[::2],
    "one_row_for_all": lambda draw, dtype: draw.normal(1, D, dtype=dtype).expand(V, D),
}


BIAS = {
    "none": lambda draw, dtype: None,
    "strided": lambda draw, dtype: draw.normal(2 * V, dtype=dtype)[1::2],
    "expanded": lambda draw, dtype: draw.normal(1, dtype=dtype).expand(V),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", UNEMBED)
@pytest.mark.parametrize("bias", BIAS)
def test_unembed_and_bias_of_any_strides(compare, draw, form: str, bias: str, dtype: torch.dtype) -> None:
    """Gradients in their shapes, through products that read them in place."""
    compare(
        draw.normal(1, S, 2, D, dtype=dtype), draw.integers(V, 1, S), unembed=UNEMBED[form](draw, dtype),
        bias=BIAS[bias](draw, dtype), chunk_bytes=5 * V * dtype.itemsize,
    )  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("drop", [True, False, 30])
def test_a_list_of_heads_is_their_stack(impl, draw, evaluate, drop: bool | int) -> None:
    """Row by row bit for bit, list or tuple; sums over rows in another order."""
    hidden, labels, weights = draw.normal(B, S, H, D), draw.integers(V, B, S), draw.normal(B, S)
    labels[0, 1] = -100
    options = {"unembed": draw.normal(V, D), "chunk_bytes": 7 * V * 4, "drop_dead_rows": drop}
    # On a grid the logits are exact, so that no product can tell how many rows came with a row.
    hidden, options["unembed"] = ((x * 8).round() / 8 for x in (hidden, options["unembed"]))
    whole = evaluate(impl, hidden, labels, weights, **options)
    for collection in (list, tuple):
        parts = evaluate(impl, collection(head.contiguous() for head in hidden.unbind(2)), labels, weights, **options)
        assert torch.equal(parts.loss, whole.loss)
        for one, other in zip(parts.stats, whole.stats, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(parts.d_token_weights, whole.d_token_weights)
        torch.testing.assert_close(torch.stack(parts.d_hidden, dim=2), whole.d_hidden[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts.d_unembed, whole.d_unembed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_different_layouts(compare, draw, dtype: torch.dtype) -> None:
    """Contiguous, transposed, a slice of wider rows, expanded over the batch; chunks that end inside a head."""
    heads = [
        draw.normal(B, S, D, dtype=dtype),
        draw.normal(S, B, D, dtype=dtype).transpose(0, 1),
        draw.normal(B, S, D + 4, dtype=dtype)[..., 3 : D + 3],
        draw.normal(1, S, D, dtype=dtype).expand(B, S, D),
    ]
    for drop in (True, False):
        compare(
            heads, draw.integers(V, B, S), draw.normal(B, S), unembed=draw.normal(V, D, dtype=dtype),
            chunk_bytes=5 * V * dtype.itemsize, drop_dead_rows=drop,
        )  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_three_dimensions_mean_one_head(impl, draw, evaluate) -> None:
    """[B,S,D], [B,S,1,D] and [one tensor] are the same thing."""
    hidden, labels, unembed = draw.normal(B, S, D), draw.integers(V, B, S), draw.normal(V, D)
    given: list[Tensor | list[Tensor]] = [hidden, hidden[:, :, None], [hidden]]
    plain, with_head, listed = (evaluate(impl, x, labels, unembed=unembed) for x in given)
    for other in (with_head, listed):
        assert torch.equal(plain.loss, other.loss)
        assert torch.equal(plain.d_unembed, other.d_unembed)
        assert torch.equal(plain.stats.ce, other.stats.ce)
    assert plain.d_hidden[0].shape == listed.d_hidden[0].shape == (B, S, D)
    assert torch.equal(plain.d_hidden[0], with_head.d_hidden[0][:, :, 0])
    assert torch.equal(plain.d_hidden[0], listed.d_hidden[0])


def test_the_same_tensor_as_two_heads(compare, draw) -> None:
    """One hidden state scored against two tokens: its gradients add up in autograd."""
    head = draw.normal(B, S, D)
    compare([head, head], draw.integers(V, B, S), unembed=draw.normal(V, D))


def test_hidden_states_expanded_over_heads(compare, draw) -> None:
    """Head stride 0: each head gets its own gradient."""
    compare(draw.normal(B, S, 1, D).expand(B, S, H, D), draw.integers(V, B, S), unembed=draw.normal(V, D))


def test_hidden_states_of_one_feature(compare, draw) -> None:
    """D = 1."""
    compare(draw.normal(B, S, H, 1), draw.integers(V, B, S), unembed=draw.normal(V, 1), chunk_bytes=3 * V * 4)
