"""WeightedMTPLoss: the function with its options held."""

import copy

import pytest
import torch

from mtp_ce import MTPLoss, WeightedMTPLoss, weighted_mtp_ce


def test_the_module_is_the_function(impl, draw) -> None:
    """Every option held, every tensor of the batch passed on; bit for bit."""
    logits, labels, weights = draw.normal(2, 5, 3, 29), draw.integers(29, 2, 5), draw.uniform(2, 5)
    held = {
        "shift": 0, "weight_alignment": "target", "ignore_index": 3, "loss_scale": 0.5, "softcap": 7.0,
        "z_loss": 0.01, "label_smoothing": 0.1, "validate": True, "impl": impl,
    }  # fmt: skip
    batch = {
        "seq_lens": torch.tensor([5, 3], device=logits.device),
        "document_ids": torch.tensor([[0, 0, 0, 1, 1]] * 2, device=logits.device),
        "normalizer": 6.0,
    }
    module = WeightedMTPLoss(**held)
    assert torch.equal(
        module(logits, labels, weights, **batch), weighted_mtp_ce(logits, labels, weights, **held, **batch)
    )
    per_token = WeightedMTPLoss(reduction="none", head_reduction="horizon", impl=impl)
    wanted = weighted_mtp_ce(logits, labels, reduction="none", head_reduction="horizon", impl=impl)
    assert torch.equal(per_token(logits, labels), wanted)


def test_the_module_returns_statistics_on_request(impl, draw) -> None:
    """MTPLoss in place of the loss."""
    logits, labels = draw.normal(1, 4, 2, 9), draw.integers(9, 1, 4)
    result = WeightedMTPLoss(return_stats=True, impl=impl)(logits, labels)
    assert isinstance(result, MTPLoss)
    assert torch.equal(result.loss, weighted_mtp_ce(logits, labels, impl=impl))


def test_head_weights_are_a_buffer(impl, draw) -> None:
    """They move with the module, are saved with it, and are no parameter."""
    module = WeightedMTPLoss(head_weights=torch.tensor([1.0, 0.5]), impl=impl)
    assert [name for name, _ in module.named_buffers()] == ["head_weights"]
    assert list(module.parameters()) == []
    assert torch.equal(module.state_dict()["head_weights"], torch.tensor([1.0, 0.5]))
    assert copy.deepcopy(module).to(torch.float64).head_weights.dtype == torch.float64
    assert module.to("meta").head_weights.device.type == "meta"
    logits, labels = draw.normal(1, 4, 2, 9), draw.integers(9, 1, 4)
    a = torch.tensor([1.0, 0.5], device=logits.device)
    module = WeightedMTPLoss(head_weights=a, impl=impl)
    assert torch.equal(module(logits, labels), weighted_mtp_ce(logits, labels, head_weights=a, impl=impl))
    assert dict(WeightedMTPLoss().named_buffers()) == {}


def test_gradients_flow_through_the_module(impl, draw) -> None:
    """To logits and to token weights, in place too."""
    labels = draw.integers(9, 1, 4)
    hidden, weights = draw.normal(1, 4, 2, 9).requires_grad_(), draw.uniform(1, 4).requires_grad_()
    wanted = torch.autograd.grad(weighted_mtp_ce(hidden * 2, labels, weights, impl=impl), (hidden, weights))
    loss = WeightedMTPLoss(inplace_backward=True, impl=impl)(hidden * 2, labels, weights)
    for got, want in zip(torch.autograd.grad(loss, (hidden, weights)), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shift": -1}, "shift"),
        ({"shift": 1.0}, "shift"),
        ({"softcap": 0.0}, "softcap"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"reduction": "avg"}, "reduction"),
        ({"weight_alignment": "token"}, "weight_alignment"),
        ({"impl": "cuda"}, "impl"),
        ({"head_weights": [1.0, 2.0]}, "head_weights"),
        ({"head_weights": torch.ones(2, 2)}, "head_weights"),
        ({"head_weights": torch.ones(2), "head_reduction": "horizon"}, "head_reduction"),
        ({"inplace_backward": 1}, "inplace_backward"),
        ({"validate": "yes"}, "validate"),
        ({"loss_scale": float("nan")}, "loss_scale"),
        ({"ignore_index": None}, "ignore_index"),
        ({"temperature": 2.0}, "temperature"),
        ({"normalizer": 2.0}, "normalizer"),
        ({"return_stats": "yes"}, "return_stats"),
    ],
    ids=lambda value: (
        "_".join(f"{name}_{type(v).__name__}" for name, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_wrong_options_are_named_at_construction(options: dict, named: str) -> None:
    """A mistake in a recipe shows before the first batch."""
    with pytest.raises((TypeError, ValueError), match=named):
        WeightedMTPLoss(**options)


def test_the_module_prints_its_options() -> None:
    """repr shows what was given."""
    shown = repr(WeightedMTPLoss(softcap=30.0, z_loss=1e-4, reduction="sum"))
    assert "softcap=30.0" in shown
    assert "z_loss=0.0001" in shown
    assert "reduction='sum'" in shown
