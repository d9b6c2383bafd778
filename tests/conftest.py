"""What every test stands on: Triton on any machine, and the measure of being right.

Where there is no GPU the Triton kernels run in Triton's interpreter; where there is one the same tests run on it. A
result is right when its error against the oracle in float64 is at most three times the error of eager torch at the same
dtype, plus the last bits of the terms that it sums (`UNITS_IN_LAST_PLACE`).
"""

import math
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read by @triton.jit, hence before anything imports a kernel.
    os.environ["TRITON_INTERPRET"] = "1"

# Eager torch can be exact by luck, above all in a scalar, so three times its error may be 0. What no fp32 arithmetic
# avoids is a rounding in each of the few steps between a row and the result.
UNITS_IN_LAST_PLACE = 4


def _mend_interpreter() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert, patch = interpreter._convert_float, interpreter._patch_lang

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        # The interpreter truncates fp32 to bf16; every device rounds to the nearest, ties to even, as torch does.
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(values, dtype=torch.float32).bfloat16()
            return rounded.view(torch.int16).numpy().view("uint16")
        return convert(values, source, target, rounding)

    def patch_lang(function: Any) -> Any:
        # Called again for every call of a device function, and then two thirds of all time goes into finding that
        # triton.language is patched already.
        modules = [m for m in (function.__globals__.get("tl"), function.__globals__.get("core")) if m in (tl, tl.core)]
        if modules and not any(tl.core.is_builtin(m.load) for m in modules):
            return None
        return patch(function)

    interpreter._convert_float, interpreter._patch_lang = convert_float, patch_lang


if not HAS_GPU:
    _mend_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; the only reason for which a test here is skipped.")
    # Both branches of a where are computed, so the one that is not chosen may overflow: as on a device, but aloud.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_gpu = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(needs_gpu)


@pytest.fixture(params=["cpu", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """The two fast implementations; their contract is one."""
    return request.param


@pytest.fixture
def device(impl: str) -> torch.device:
    """Where the tensors of `impl` live."""
    return torch.device("cuda" if HAS_GPU and impl == "triton" else "cpu")


@pytest.fixture
def draw(device: torch.device) -> SimpleNamespace:
    """Seeded numbers, the same for every device: normal(*shape), uniform(*shape), integers(high, *shape)."""
    generator = torch.Generator().manual_seed(2404_19737)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    def uniform(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.rand(shape, generator=generator) + 0.1).to(device, dtype)

    def integers(high: int, *shape: int, low: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device, dtype)

    return SimpleNamespace(normal=normal, uniform=uniform, integers=integers, generator=generator)


Given = Tensor | Sequence[Tensor]


def evaluate(
    impl: str,
    logits: Given,
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    upstream: Tensor | float | None = None,
    weights_gradient: bool = True,
    **options: Any,
) -> SimpleNamespace:
    """loss, d_logits (one for each tensor given), d_token_weights, stats, of leaves over the caller's own memory."""
    from mtp_ce import weighted_mtp_ce

    several = not isinstance(logits, Tensor)
    leaves = [x.detach().requires_grad_() for x in (logits if several else [logits])]
    wanted = list(leaves)
    if token_weights is not None:
        token_weights = token_weights.detach().requires_grad_(weights_gradient)
        wanted += [token_weights] * weights_gradient
    loss, stats = weighted_mtp_ce(
        leaves if several else leaves[0], labels, token_weights, impl=impl, return_stats=True, **options
    )
    if upstream is None:
        upstream = torch.ones_like(loss)
    elif not isinstance(upstream, Tensor):
        upstream = torch.full_like(loss, upstream)
    gradients = torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))
    return SimpleNamespace(
        loss=loss.detach(),
        d_logits=list(gradients[: len(leaves)]),
        d_token_weights=gradients[-1] if len(wanted) > len(leaves) else None,
        stats=stats,
    )


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [_double(item) for item in value] if isinstance(value, (list, tuple)) else value


def _positive(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) else abs(value) if isinstance(value, float) else value


def _largest(values: Tensor | None) -> float:
    values = torch.zeros(1) if values is None else values[values.isfinite()]
    return float(values.abs().max()) if values.numel() else 0.0


def _error(got: Tensor, exact: Tensor) -> float:
    """The largest distance; infinite where got is not finite and exact is, or the other way round."""
    same = (got == exact) | (got.isnan() & exact.isnan())
    distance = torch.where(same, 0.0, (got.double() - exact.double()).abs())
    return float(distance.nan_to_num(math.inf).max()) if distance.numel() else 0.0


def _rounding_units(
    exact: SimpleNamespace, size: SimpleNamespace, weights: Any, options: Any, logits: Given
) -> dict[str, float]:
    """What the last bit of each result is a bit of. `size` is the result with every term taken as positive.

    The sum of exponentials is at least 1, so its logarithm, and with it ce, carries the last bit of 1 however small
    it is; g (p - 1) carries the last bit of g, however near p is to 1. Label smoothing adds e times a logit and a mean
    of logits, and with them their last bits, even where the two cancel.
    """
    reduction, normalizer = options.get("reduction", "mean"), options.get("normalizer")
    positions = float(exact.stats.live.any(-1).sum())
    one = abs(options.get("loss_scale", 1.0))  # what one nat of avg * w is worth in the loss
    if reduction == "mean" and positions:
        one /= positions if normalizer is None else float(normalizer)
    largest_weight = 1.0 if weights is None else _largest(weights)
    heads = [logits] if isinstance(logits, Tensor) else logits
    row = 1 + options.get("label_smoothing", 0.0) * max(_largest(head) for head in heads)
    upstream = 1.0 if options["upstream"] is None else _largest(torch.as_tensor(options["upstream"]))
    return {
        "loss": _largest(size.loss) + one * row * largest_weight * (1 if reduction == "none" else positions),
        "d_logits": one * largest_weight * upstream,
        "d_token_weights": _largest(size.d_token_weights) + one * row * upstream,
        "ce": 1 + _largest(exact.stats.ce),
        "lse": math.log(heads[0].shape[-1]) + _largest(exact.stats.lse),
    }


def _assert_dead_rows_are_zero(got: SimpleNamespace, exact: SimpleNamespace) -> None:
    dead = exact.stats.top1 < 0
    assert bool((got.stats.top1[dead] == -1).all()), "top1 of a dead row is not -1"
    for name in ("ce", "lse"):
        assert bool((getattr(got.stats, name)[dead] == 0).all()), f"{name} of a dead row is not 0"
    several = len(got.d_logits) > 1 or got.d_logits[0].dim() == 3
    for h, gradient in enumerate(got.d_logits if several else got.d_logits[0].unbind(2)):
        assert bool((gradient[dead[:, :, h]] == 0).all()), f"a dead row of head {h} has a gradient"


def _assert_top1_is_the_largest(got: SimpleNamespace, exact: SimpleNamespace, logits: Given, softcap: Any) -> None:
    heads = [*logits] if not isinstance(logits, Tensor) else [*logits.unbind(2)] if logits.dim() == 4 else [logits]
    for h, head in enumerate(heads):
        read = (exact.stats.top1[:, :, h] >= 0) & ~head.isnan().any(-1)
        z = head[read].double()
        chosen = z.gather(-1, got.stats.top1[:, :, h][read].long()[:, None])[:, 0]
        if softcap is None:
            assert torch.equal(chosen, z.amax(-1)), f"top1 of head {h} is not the largest logit"
        else:
            # Distinct logits can meet in one fp32 number under the cap.
            capped, largest = (softcap * torch.tanh(x / softcap) for x in (chosen, z.amax(-1)))
            assert bool((largest - capped <= 1e-6 * largest.abs()).all()), f"top1 of head {h} is not the largest"


def compare(
    impl: str, logits: Given, labels: Tensor, token_weights: Tensor | None = None, **options: Any
) -> SimpleNamespace:
    """Assert that impl errs at most three times as much as eager torch, in every result; returns impl's results."""
    options.setdefault("upstream", None)
    got = evaluate(impl, logits, labels, token_weights, **options)
    peer = evaluate("reference", logits, labels, token_weights, **options)
    wide_logits, wide_weights = _double(logits), _double(token_weights)
    wide = {name: _double(value) for name, value in options.items()}
    exact = evaluate("reference", wide_logits, labels, wide_weights, **wide)
    size = evaluate(
        "reference", wide_logits, labels, _positive(wide_weights), **{**wide, "upstream": _positive(wide["upstream"])}
    )

    first = logits if isinstance(logits, Tensor) else logits[0]
    units = _rounding_units(exact, size, wide_weights, wide, logits)
    bit = UNITS_IN_LAST_PLACE * torch.finfo(got.loss.dtype).eps
    assert got.loss.dtype == (torch.float64 if first.dtype == torch.float64 else torch.float32)
    assert torch.equal(got.stats.live, exact.stats.live)

    def results(outcome: SimpleNamespace) -> dict[str, Tensor]:
        named = {"loss": outcome.loss, "ce": outcome.stats.ce, "lse": outcome.stats.lse}
        named |= {f"d_logits[{i}]": gradient for i, gradient in enumerate(outcome.d_logits)}
        return named | ({} if outcome.d_token_weights is None else {"d_token_weights": outcome.d_token_weights})

    ours, theirs, truth = results(got), results(peer), results(exact)
    for name, value in ours.items():
        assert value.shape == truth[name].shape, name
        assert value.dtype == theirs[name].dtype, name
        error, allowed = _error(value, truth[name]), 3 * _error(theirs[name], truth[name])
        allowed += bit * units[name.partition("[")[0]]
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, of {_largest(truth[name]):.3e}"
    _assert_dead_rows_are_zero(got, exact)
    _assert_top1_is_the_largest(got, exact, logits, wide.get("softcap"))
    return got


@pytest.fixture(name="evaluate")
def evaluate_fixture() -> Callable[..., SimpleNamespace]:
    """The function `evaluate` of this file."""
    return evaluate


@pytest.fixture(name="compare")
def compare_fixture(impl: str) -> Callable[..., SimpleNamespace]:
    """The function `compare` of this file, for `impl`."""
    return lambda *tensors, **options: compare(impl, *tensors, **options)
