"""token_ce: the cross entropy of every row, as a number and nothing more."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ce import token_ce, weighted_mtp_ce, weighted_mtp_linear_ce

B, S, H, D, V = 2, 6, 3, 16, 45
IMPLEMENTATIONS = ["reference", "cpu", "triton"]


def batch(draw, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, unembed, labels with a hole."""
    labels = draw.integers(V, B, S)
    labels[0, 2] = -100
    return draw.normal(B, S, H, D, dtype=dtype), draw.normal(V, D, dtype=dtype), labels


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shift_0": {"shift": 0},
    "shift_2": {"shift": 2},
    "softcap": {"softcap": 2.0},
    "seq_lens": {"seq_lens": torch.tensor([4, 6])},
    "document_ids": {"document_ids": torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 0, 0]])},
    "ignore_index": {"ignore_index": 7},
    "bias": {"bias": torch.linspace(-1, 1, V)},
    "chunks": {"chunk_bytes": 5 * V * 4},
    "all_rows": {"drop_dead_rows": False},
    "a_bound_of_rows": {"drop_dead_rows": B * S * H},
    "validate": {"validate": True},
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_statistic_of_the_loss(impl, draw, device, name: str) -> None:
    """stats.ce of both paths, option by option; 0 where a row has no target."""
    hidden, unembed, labels = batch(draw)
    options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in OPTIONS[name].items()}
    labels.masked_fill_(labels == -100, options.get("ignore_index", -100))
    ce = token_ce(hidden, unembed, labels, impl=impl, **options)
    of_linear = weighted_mtp_linear_ce(hidden, unembed, labels, impl=impl, return_stats=True, **options).stats
    assert torch.equal(ce, of_linear.ce)
    assert bool((ce[~of_linear.live] == 0).all())
    assert bool((ce[of_linear.live] != 0).all())
    rule = ("shift", "softcap", "seq_lens", "document_ids", "ignore_index")
    of_logits = {key: value for key, value in options.items() if key in rule}
    logits = F.linear(hidden, unembed, options.get("bias"))
    wanted = weighted_mtp_ce(logits, labels, impl=impl, return_stats=True, **of_logits).stats.ce
    torch.testing.assert_close(ce, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_has_the_shape_of_its_input_and_is_fp32(impl, draw, dtype: torch.dtype) -> None:
    """[B,S,H] for [B,S,H,D] and for a list, [B,S] for [B,S,D]."""
    hidden, unembed, labels = batch(draw, dtype)
    forms = {
        (B, S, H): [hidden, list(hidden.unbind(2)), tuple(x.contiguous() for x in hidden.unbind(2))],
        (B, S, 1): [hidden[:, :, :1], [hidden[:, :, 0]]],
        (B, S): [hidden[:, :, 0]],
    }
    for shape, given in forms.items():
        for one in given:
            ce = token_ce(one, unembed, labels, impl=impl)
            assert ce.shape == shape
            assert ce.dtype == torch.float32
            assert ce.device == labels.device
    torch.testing.assert_close(
        token_ce(hidden[:, :, 0], unembed, labels, impl=impl), token_ce(hidden, unembed, labels, impl=impl)[:, :, 0]
    )


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_float64_stays_float64(impl, draw) -> None:
    """To thirteen digits."""
    hidden, unembed, labels = batch(draw, torch.float64)
    ce = token_ce(hidden, unembed, labels, impl=impl)
    wanted = F.cross_entropy(
        F.linear(hidden[:, :-1, 0], unembed).flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    assert ce.dtype == torch.float64
    torch.testing.assert_close(ce[:, :-1, 0].flatten(), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_never_wants_a_gradient(impl, draw) -> None:
    """No graph, whatever its inputs require; and no leaf's gradient is touched."""
    hidden, unembed, labels = batch(draw)
    ce = token_ce(hidden.requires_grad_(), unembed.requires_grad_(), labels, impl=impl)
    assert not ce.requires_grad
    assert ce.grad_fn is None
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="does not require grad"):
        ce.sum().backward()
    assert hidden.grad is None
    assert unembed.grad is None


@pytest.mark.parametrize("impl", ["cpu"])
def test_it_takes_no_weights(impl, draw) -> None:
    """Scores are of tokens; what weights them comes later."""
    hidden, unembed, labels = batch(draw)
    for name in ("token_weights", "head_weights", "reduction", "normalizer", "loss_scale", "z_loss", "label_smoothing"):
        with pytest.raises(TypeError, match=name):
            token_ce(hidden, unembed, labels, **{name: None})


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_no_logits_and_no_gradient_are_ever_allocated(impl, draw, watch) -> None:
    """The most that is held: a chunk of logits, a chunk of gathered rows, and some numbers a row."""
    features, vocabulary, length, rows = 128, 1024, 40, 4
    hidden, unembed = draw.normal(1, length, 1, features), draw.normal(vocabulary, features)
    labels = draw.integers(vocabulary, 1, length)

    def run() -> Tensor:
        return token_ce(
            hidden.requires_grad_(), unembed.requires_grad_(), labels, chunk_bytes=rows * vocabulary * 4, impl=impl
        )

    run()
    seen = watch(run)
    logits_chunk = rows * (vocabulary + 16) * 4
    bound, peak = logits_chunk + rows * features * 4 + 128 * length + 16384, seen.peak
    assert peak <= bound + seen.spare
    assert bound < length * vocabulary * 4
    assert bound < vocabulary * features * 4
    assert seen.products == -(-(length - 1) // rows)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_model_that_knows_the_next_token_scores_near_zero(impl, draw, device) -> None:
    """And one that is off by one does not: the alignment that scorers stand on."""
    labels = torch.randperm(9, generator=draw.generator)[None].to(device)
    unembed = 60 * torch.eye(9, device=device)
    for distance, near_zero in ((0, False), (1, True), (2, False)):
        knows = F.one_hot(labels.roll(-distance, 1), 9).float()
        ce = token_ce(knows, unembed, labels, impl=impl)
        assert bool((ce[:, :-2] < 1e-6).all()) == near_zero
        assert ce[0, -1] == 0
