"""No number for a wrong result: what every case passes before it is timed.

logits      the loss over all rows, and d_logits of three spans of rows: the first, one in the middle, the last
linear      the loss, d_hidden and d_unembed, whole
token_ce    every row's cross entropy

They are compared with mtp_ce/reference.py in float64. A result may err three times as much as eager torch at the dtype
of the inputs, plus four units in the last place of the terms it sums, the rule of the tests. The unit is that of fp32,
or of the inputs' dtype for a provider that is known to round sums to it (`Provider.rounds`).

A row's loss depends on its own logits, its label and its coefficient w / K / N alone. So the oracle is called on rows,
as many at a time as keep the float64 copies small, with the coefficients from here (`row_rule`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import IGNORED, Inputs, Shape, head_targets
from mtp_ce.reference import reference_weighted_mtp_ce

UNITS_IN_LAST_PLACE = 4
CHECKED_ROWS = 64
# Float64 logits of a product, and of a call of the oracle: below 32 MiB a host's allocator uses memory again that it
# has touched before, above it every temporary begins with fresh pages, which cost more than what is computed in them.
SPAN_BYTES = {"cpu": 2**29, "cuda": 2**30}
CALL_BYTES = {"cpu": 2**24, "cuda": 2**30}
COMPARED_BYTES = {"cpu": 2**24, "cuda": 2**28}

Results = dict[str, Tensor]


class Expected(NamedTuple):
    """A part of a result in float64, and how far eager torch is from it."""

    name: str
    start: int  # of the rows that `value` says something about
    value: Tensor
    eager_error: float
    largest_term: float


class Error(NamedTuple):
    """The largest distance of a result from the oracle, and what is allowed."""

    distance: float
    allowed: float

    @property
    def acceptable(self) -> bool:
        """Within the rule. Written so that NaN is not."""
        return self.distance <= self.allowed


def row_rule(labels: Tensor, token_weights: Tensor, H: int, weighted: bool) -> tuple[Tensor, Tensor]:
    """Target and coefficient [N] of every row: w / K / positions, or 1 / live rows for the plain mean."""
    target = head_targets(labels, H)  # [B, S, H]
    live = target != IGNORED
    heads = live.sum(-1, keepdim=True)
    if weighted:
        coefficient = token_weights.double()[..., None] / heads.clamp(min=1) / (heads > 0).sum()
    else:
        coefficient = torch.ones_like(target, dtype=torch.float64) / live.sum()
    return target.flatten(), torch.where(live, coefficient, 0.0).flatten()


def _rows(
    z: Tensor, target: Tensor, coefficient: Tensor | None, softcap: float | None, gradient: bool
) -> tuple[float, Tensor, Tensor | None]:
    """Loss, ce [R] and d_z of rows [R, V] by the oracle, each row a sequence of its own."""
    total, ce, d_z = 0.0, [], torch.empty_like(z) if gradient else None
    length = max(1, CALL_BYTES[z.device.type] // (8 * z.shape[1]))
    for begin in range(0, len(z), length):
        here = slice(begin, begin + length)
        rows = z[here].detach().requires_grad_(gradient)
        weights = None if coefficient is None else coefficient[here, None]
        with torch.set_grad_enabled(gradient):
            loss, row_ce, *_ = reference_weighted_mtp_ce(
                [rows[:, None]], target[here, None], weights, shift=0, reduction="sum", softcap=softcap
            )
        total += float(loss.detach())
        ce.append(row_ce[:, 0, 0])
        if d_z is not None:
            (d_z[here],) = torch.autograd.grad(loss, rows)
    return total, torch.cat(ce), d_z


def _spans(shape: Shape, device: torch.device) -> Iterator[slice]:
    length = max(1, SPAN_BYTES[device.type] // (8 * shape.V))
    for begin in range(0, shape.rows, length):
        yield slice(begin, min(begin + length, shape.rows))


def _of_logits(
    shape: Shape, inputs: Inputs, target: Tensor, coefficient: Tensor, dtype: torch.dtype
) -> dict[tuple[str, int], Tensor]:
    logits = inputs.values["logits"].flatten(0, 2)

    def of(span: slice, gradient: bool) -> tuple[float, Tensor, Tensor | None]:
        return _rows(logits[span].to(dtype), target[span], coefficient[span], inputs.softcap, gradient)

    loss = sum(of(span, gradient=False)[0] for span in _spans(shape, logits.device))
    found = {("loss", 0): logits.new_tensor([loss], dtype=torch.float64)}
    length = min(CHECKED_ROWS, shape.rows)
    for begin in sorted({0, (shape.rows - length) // 2, shape.rows - length}):
        d_logits = of(slice(begin, begin + length), gradient=True)[2]
        assert d_logits is not None
        found["d_logits", begin] = d_logits
    return found


def _of_hidden(
    shape: Shape, inputs: Inputs, target: Tensor, coefficient: Tensor, dtype: torch.dtype
) -> dict[tuple[str, int], Tensor]:
    """By products over spans of rows; d_unembed is summed in fp32 at least and rounded once, as one product does it."""
    gradient = shape.path == "linear"
    unembed = inputs.values["unembed"].to(dtype)
    total = torch.zeros_like(unembed, dtype=torch.promote_types(dtype, torch.float32)) if gradient else None
    loss, ce, d_hidden = 0.0, [], []
    for span in _spans(shape, unembed.device):
        x = inputs.values["hidden"].flatten(0, 2)[span].to(dtype)
        part, row_ce, d_z = _rows(
            x @ unembed.t(), target[span], coefficient[span] if gradient else None, inputs.softcap, gradient
        )
        loss += part
        ce.append(row_ce)
        if d_z is not None and total is not None:
            d_hidden.append(d_z @ unembed)
            total.addmm_(d_z.t().to(total.dtype), x.to(total.dtype))
    if total is None:
        return {("ce", 0): torch.cat(ce)}
    value = unembed.new_tensor([loss], dtype=torch.float64)
    return {("loss", 0): value, ("d_hidden", 0): torch.cat(d_hidden), ("d_unembed", 0): total.to(dtype)}


def _distance(got: Tensor, value: Tensor) -> float:
    """Largest difference, a part at a time: a difference in float64 is as large as the truth."""
    largest = 0.0
    length = max(1, COMPARED_BYTES[value.device.type] // (8 * max(1, value[:1].numel())))
    for a, b in zip(got.split(length), value.split(length), strict=True):
        # NaN is no number to take the largest of, and must not pass.
        largest = max(largest, float((a.double() - b).abs().nan_to_num(float("inf")).max()))
    return largest


def find_truth(shape: Shape, inputs: Inputs, weighted: bool = True) -> list[Expected]:
    """The oracle's results of one problem; of the plain mean over rows where `weighted` is False."""
    target, coefficient = row_rule(inputs.labels, inputs.token_weights, shape.H, weighted)
    walk = _of_logits if shape.path == "logits" else _of_hidden
    eager = walk(shape, inputs, target, coefficient, shape.torch_dtype)
    exact = walk(shape, inputs, target, coefficient, torch.float64)
    largest = float(coefficient.abs().max())
    terms = {"d_logits": largest}
    if shape.path == "linear":
        # A row of d_unembed is a sum of rows of hidden, and the other way round.
        hidden, unembed = (float(inputs.values[name].abs().max()) for name in ("hidden", "unembed"))
        terms |= {"d_hidden": largest * unembed, "d_unembed": largest * hidden}
    return [
        Expected(
            name, start, value, _distance(eager.pop((name, start)), value), terms.get(name, float(value.abs().max()))
        )
        for (name, start), value in exact.items()
    ]


def check(truth: list[Expected], results: Results, unit_of: torch.dtype = torch.float32) -> dict[str, Error]:
    """The error of every result, the worst of its parts, for a provider whose sums have a dtype."""
    unit = UNITS_IN_LAST_PLACE * torch.finfo(unit_of).eps
    errors: dict[str, Error] = {}
    for expected in truth:
        rows = results[expected.name].detach().reshape(-1, *expected.value.shape[1:])
        got = rows[expected.start : expected.start + len(expected.value)]
        error = Error(_distance(got, expected.value), 3 * expected.eager_error + unit * expected.largest_term)
        worst = errors.get(expected.name)
        if worst is None or not error.distance / error.allowed <= worst.distance / worst.allowed:
            errors[expected.name] = error
    return errors
