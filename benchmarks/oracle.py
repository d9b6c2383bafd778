"""No number for a wrong result: what every case passes before it is timed.

The loss over all rows, and the gradient of three spans of positions (the first, one in the middle, and the last, where
heads run out of targets), are compared with mtp_ce/reference.py in float64. A result may err three times as much as
eager torch at the dtype of the logits, plus four units in the last place of the terms it sums, the rule of the tests.

The oracle runs over spans of positions, so that float64 copies of the logits never exceed a few hundred MiB: a row's
loss and gradient depend on its own logits and labels, and on the number of positions, which is given.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Inputs, Shape, live_mask
from mtp_ce.reference import reference_weighted_mtp_ce

UNITS_IN_LAST_PLACE = 4
CHECKED_POSITIONS = 16
SPAN_BYTES = {"cpu": 2**26, "cuda": 2**29}


class Truth(NamedTuple):
    """The exact results in float64, and how far eager torch is from them."""

    loss: float
    loss_error: float
    gradients: dict[int, Tensor]  # first position of a span -> d_logits [B, span, H, V]
    gradient_error: float
    largest_coefficient: float


class Errors(NamedTuple):
    """Largest distances from the oracle, and what was allowed."""

    loss: float
    loss_allowed: float
    d_logits: float
    d_logits_allowed: float

    @property
    def acceptable(self) -> bool:
        """Within the rule. Written so that NaN is not."""
        return self.loss <= self.loss_allowed and self.d_logits <= self.d_logits_allowed

    def as_dict(self) -> dict[str, float]:
        """For the results file: the errors, and how much of what the rule allows they take."""
        used = max(self.loss / self.loss_allowed, self.d_logits / self.d_logits_allowed)
        return {"max_error_loss": self.loss, "max_error_d_logits": self.d_logits, "of_allowed": round(used, 4)}


def _span(
    inputs: Inputs, positions: float, begin: int, end: int, dtype: torch.dtype, gradient: bool
) -> tuple[float, Tensor | None]:
    """This span's part of the loss, and its gradient [B, end - begin, H, V], by the oracle at a dtype."""
    H = inputs.base.shape[2]
    # H more positions hold the labels that the last ones need; a weight of 0 keeps their rows out.
    reach = slice(begin, begin + (end - begin) + H)
    weights = inputs.token_weights[:, reach].to(torch.float64 if dtype == torch.float64 else torch.float32).clone()
    weights[:, end - begin :] = 0
    logits = inputs.base[:, reach].to(dtype).requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        loss, *_ = reference_weighted_mtp_ce(
            [logits[:, :, h] for h in range(H)], inputs.labels[:, reach], weights, normalizer=positions
        )
    if not gradient:
        return float(loss), None
    loss.backward()
    assert logits.grad is not None
    return float(loss.detach()), logits.grad[:, : end - begin].clone()


def _checked_spans(S: int) -> Iterator[tuple[int, int]]:
    length = min(CHECKED_POSITIONS, S)
    for begin in sorted({0, (S - length) // 2, S - length}):
        yield begin, begin + length


def find_truth(shape: Shape, inputs: Inputs) -> Truth:
    """The oracle's results of one problem, shared by all providers."""
    S, positions = shape.S, float(live_mask(inputs.labels, shape.H).any(-1).sum())
    length = max(1, SPAN_BYTES[inputs.base.device.type] // (8 * shape.B * shape.H * shape.V))
    spans = [(begin, min(begin + length, S)) for begin in range(0, S, length)]
    exact, eager = (
        sum(_span(inputs, positions, *span, dtype, gradient=False)[0] for span in spans)
        for dtype in (torch.float64, shape.torch_dtype)
    )
    gradients, gradient_error = {}, 0.0
    for begin, end in _checked_spans(S):
        _, wide = _span(inputs, positions, begin, end, torch.float64, gradient=True)
        _, own = _span(inputs, positions, begin, end, shape.torch_dtype, gradient=True)
        assert wide is not None
        assert own is not None
        gradients[begin] = wide
        gradient_error = max(gradient_error, float((own.double() - wide).abs().max()))
    coefficient = float(inputs.token_weights.abs().max()) / positions
    return Truth(exact, abs(eager - exact), gradients, gradient_error, coefficient)


def check(truth: Truth, loss: Tensor, d_logits: Tensor, rounded: torch.dtype = torch.float32) -> Errors:
    """The errors of a provider whose row losses are rounded to a dtype."""
    unit = UNITS_IN_LAST_PLACE * torch.finfo(rounded).eps
    loss_error = abs(float(loss.detach()) - truth.loss)
    gradient_error = 0.0
    for begin, wide in truth.gradients.items():
        got = d_logits[:, begin : begin + wide.shape[1]].double()
        # NaN is no number to take the largest of, and must not pass.
        gradient_error = max(gradient_error, float((got - wide).abs().nan_to_num(float("inf")).max()))
    return Errors(
        loss_error,
        3 * truth.loss_error + unit * abs(truth.loss),
        gradient_error,
        3 * truth.gradient_error + unit * truth.largest_coefficient,
    )
