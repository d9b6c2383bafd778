"""The check that every case passes before it is timed.

logits      the loss over all rows, and d_logits of three spans of rows: the first, one in the middle, the last
linear      the loss, d_hidden and d_unembed, whole
token_ce    the cross entropy of every row

The oracle is mtp_ce/reference.py in float64. The rule is that of the tests: a result may err three times as much as
eager torch at the dtype of the inputs, plus four units in the last place of the terms it sums. The unit is that of
fp32, or of the inputs' dtype for a provider that is known to round sums to it (`Provider.rounds`).

A row's loss depends only on its own logits, its label and its coefficient w / K / N. So the oracle is called on rows,
few enough at a time that the float64 copies stay small, with the coefficients of `row_coefficients`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import IGNORED, Inputs, Shape, head_targets
from mtp_ce.reference import reference_weighted_mtp_ce

UNITS_IN_LAST_PLACE = 4
CHECKED_ROWS = 64
# Bytes of float64 logits of a product, and of a call of the oracle. Below 32 MiB a host's allocator reuses pages that
# were touched; above, every temporary starts with fresh pages, which cost more than what is computed in them.
SPAN_BYTES = {"cpu": 2**29, "cuda": 2**30}
CALL_BYTES = {"cpu": 2**24, "cuda": 2**30}
COMPARED_BYTES = {"cpu": 2**24, "cuda": 2**28}

Results = dict[str, Tensor]


class Expected(NamedTuple):
    """A result in float64 over a span of rows, and the error of eager torch."""

    name: str
    start: int  # of the rows of `value`
    value: Tensor
    eager_error: float
    largest_term: float


class Error(NamedTuple):
    """The largest distance of a result from the oracle, and the allowed one."""

    distance: float
    allowed: float

    @property
    def acceptable(self) -> bool:
        """Whether the error is within the rule; false for NaN."""
        return self.distance <= self.allowed


def row_coefficients(labels: Tensor, token_weights: Tensor, H: int, weighted: bool) -> tuple[Tensor, Tensor]:
    """Return target and coefficient [N] of every row: w / K / positions, or 1 / valid rows for the plain mean."""
    target = head_targets(labels, H)  # [B, S, H]
    valid = target != IGNORED
    heads = valid.sum(-1, keepdim=True)
    if weighted:
        coefficient = token_weights.double()[..., None] / heads.clamp(min=1) / (heads > 0).sum()
    else:
        coefficient = torch.ones_like(target, dtype=torch.float64) / valid.sum()
    return target.flatten(), torch.where(valid, coefficient, 0.0).flatten()


class Rows(NamedTuple):
    """The oracle's results of a span of rows."""

    loss: float
    ce: Tensor  # [R]
    d_logits: Tensor | None  # [R, V]
    largest_lse: float


def _rows(z: Tensor, target: Tensor, coefficient: Tensor | None, softcap: float | None, gradient: bool) -> Rows:
    """Call the oracle on rows [R, V], each a sequence of its own."""
    total, ce, largest, d_logits = 0.0, [], 0.0, torch.empty_like(z) if gradient else None
    length = max(1, CALL_BYTES[z.device.type] // (8 * z.shape[1]))
    for begin in range(0, len(z), length):
        span = slice(begin, begin + length)
        rows = z[span].detach().requires_grad_(gradient)
        weights = None if coefficient is None else coefficient[span, None]
        with torch.set_grad_enabled(gradient):
            loss, row_ce, _, lse, _ = reference_weighted_mtp_ce(
                [rows[:, None]], target[span, None], weights, shift=0, reduction="sum", softcap=softcap
            )
        total, largest = total + float(loss.detach()), max(largest, float(lse.abs().max()))
        ce.append(row_ce[:, 0, 0])
        if d_logits is not None:
            (d_logits[span],) = torch.autograd.grad(loss, rows)
    return Rows(total, torch.cat(ce), d_logits, largest)


def _spans(shape: Shape, device: torch.device) -> Iterator[slice]:
    length = max(1, SPAN_BYTES[device.type] // (8 * shape.V))
    for begin in range(0, shape.rows, length):
        yield slice(begin, min(begin + length, shape.rows))


Truth = dict[tuple[str, int], Tensor]  # (name of a result, first row) -> value


def _of_logits(shape: Shape, inputs: Inputs, target: Tensor, coefficient: Tensor, dtype: torch.dtype) -> Truth:
    logits = inputs.values["logits"].flatten(0, 2)

    def rows(span: slice, gradient: bool) -> Rows:
        return _rows(logits[span].to(dtype), target[span], coefficient[span], inputs.softcap, gradient)

    spans = [rows(span, gradient=False) for span in _spans(shape, logits.device)]
    truth = _scalars(spans, logits)
    length = min(CHECKED_ROWS, shape.rows)
    for begin in sorted({0, (shape.rows - length) // 2, shape.rows - length}):
        d_logits = rows(slice(begin, begin + length), gradient=True).d_logits
        assert d_logits is not None
        truth["d_logits", begin] = d_logits
    return truth


def _scalars(spans: list[Rows], like: Tensor) -> Truth:
    loss, lse = sum(rows.loss for rows in spans), max(rows.largest_lse for rows in spans)
    return {("loss", 0): like.new_tensor([loss], dtype=torch.float64), ("lse", 0): like.new_tensor([lse])}


def _of_hidden(shape: Shape, inputs: Inputs, target: Tensor, coefficient: Tensor, dtype: torch.dtype) -> Truth:
    """Sum d_unembed over spans of rows in fp32 at least, and round it once, as one product does."""
    gradient = shape.path == "linear"
    unembed = inputs.values["unembed"].to(dtype)
    total = torch.zeros_like(unembed, dtype=torch.promote_types(dtype, torch.float32)) if gradient else None
    spans, d_hidden = [], []
    for span in _spans(shape, unembed.device):
        x = inputs.values["hidden"].flatten(0, 2)[span].to(dtype)
        weights = coefficient[span] if gradient else None
        rows = _rows(x @ unembed.t(), target[span], weights, inputs.softcap, gradient)
        if rows.d_logits is not None and total is not None:
            d_hidden.append(rows.d_logits @ unembed)
            total.addmm_(rows.d_logits.t().to(total.dtype), x.to(total.dtype))
        spans.append(rows._replace(d_logits=None))
    if total is None:
        return {("ce", 0): torch.cat([rows.ce for rows in spans])}
    return {
        **_scalars(spans, unembed), ("d_hidden", 0): torch.cat(d_hidden), ("d_unembed", 0): total.to(dtype),
    }  # fmt: skip


def _distance(got: Tensor, value: Tensor) -> float:
    """Return the largest difference, some rows at a time: in float64 it is as large as the truth."""
    largest = 0.0
    length = max(1, COMPARED_BYTES[value.device.type] // (8 * max(1, value[:1].numel())))
    for a, b in zip(got.split(length), value.split(length), strict=True):
        # A NaN must not pass as a small distance.
        largest = max(largest, float((a.double() - b).abs().nan_to_num(float("inf")).max()))
    return largest


def find_truth(shape: Shape, inputs: Inputs, weighted: bool = True) -> list[Expected]:
    """Return the oracle's results of one problem; of the plain mean over rows where `weighted` is False."""
    target, coefficient = row_coefficients(inputs.labels, inputs.token_weights, shape.H, weighted)
    evaluate = _of_logits if shape.path == "logits" else _of_hidden
    eager = evaluate(shape, inputs, target, coefficient, shape.torch_dtype)
    exact = evaluate(shape, inputs, target, coefficient, torch.float64)
    largest = float(coefficient.abs().max())
    terms = {"d_logits": largest}
    if shape.path != "token_ce":
        # ce = lse - z: peaked rows cancel.
        terms["loss"] = float(exact.pop(("lse", 0)))
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
    """Return the error of every result, the worst of its spans, for a provider that sums in `unit_of`."""
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
