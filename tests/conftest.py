"""Shared by every test: Triton on any machine, the tiers, and the error that a result is allowed.

Where there is no GPU the Triton kernels run in Triton's interpreter; where there is one the same tests run on it. A
result is right when its error against the oracle in float64 is at most three times the error of eager torch at the same
dtype, plus the last bits of the terms that it sums (`UNITS_IN_LAST_PLACE`).
"""

import gc
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
WORKERS = os.cpu_count() or 1
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each use every core slow each other down. Programs started by a test read the environment.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
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
        # Triton calls this for every call of a device function. Two thirds of all time would go into checking that
        # triton.language is already patched.
        modules = [m for m in (function.__globals__.get("tl"), function.__globals__.get("core")) if m in (tl, tl.core)]
        if modules and not any(tl.core.is_builtin(m.load) for m in modules):
            return None
        scope = patch(function)
        # Triton 3.6 calls int() on an array of one element, which numpy 2.4 refuses.
        tl.tensor.__index__ = lambda self: self.handle.data.item()
        return scope

    interpreter._convert_float, interpreter._patch_lang = convert_float, patch_lang


if not HAS_GPU:
    _mend_interpreter()


# The fast tier, `pytest -m core`: the contract, both implementations, gradients, and the first random cases.
CORE = {
    "test_contract", "test_masked_rows", "test_gradients", "test_linear_contract", "test_linear_gradients",
    "test_oracle", "test_random_cases",
}  # fmt: skip
CORE_SEEDS = 40
NO_PARAMETERS = SimpleNamespace(params={})


def _core_alone(config: pytest.Config) -> bool:
    return config.option.markexpr == "core"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip the import of files without a core test."""
    return True if _core_alone(config) and collection_path.is_file() and collection_path.stem not in CORE else None


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite takes every core where pytest-xdist is installed; tests chosen by path stay in one process."""
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and not HAS_GPU and config.pluginmanager.hasplugin("xdist") and option.numprocesses is None:
        option.numprocesses, option.dist = (0, "no") if option.usepdb else (WORKERS, "loadfile")
        if _core_alone(config) and not option.usepdb:
            option.dist = "load"  # a few files of very different lengths
        # xdist starts with the files of most tests; the last worker would then wait for the few long ones.
        option.loadscopereorder = False


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; the only reason for which a test here is skipped.")
    # Both branches of a `where` are computed, so the other one may overflow. A device is silent about it.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_unconfigure() -> None:
    gc.unfreeze()


def _covering(cases: list[pytest.Function]) -> list[pytest.Function]:
    """Return few of a test's crossed cases, such that any two values that meet in one of `cases` still meet in one.

    Greedy, in the order of the cases: the same choice in every process.
    """
    values = [sorted((name, repr(value)) for name, value in case.callspec.params.items()) for case in cases]
    pairs = [{*itertools.combinations(case, 2)} for case in values]
    missing, chosen = set().union(*pairs), set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [case for i, case in enumerate(cases) if i in chosen]


def _thin_out(items: list[pytest.Item]) -> None:
    """Drop the cases that `pairwise` tests do not need; the random cases cross the options in full."""
    crossed: dict[str, list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("pairwise"):
            crossed.setdefault(item.nodeid.partition("[")[0], []).append(item)
    wanted = {case.nodeid for cases in crossed.values() for case in _covering(cases)}
    items[:] = [item for item in items if item.nodeid in wanted or not item.get_closest_marker("pairwise")]


@pytest.hookimpl(tryfirst=True)  # before pytest selects by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _thin_out(items)
    items.sort(key=lambda item: "training" not in item.path.parts)  # the longest first
    needs_gpu = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        seed = getattr(item, "callspec", NO_PARAMETERS).params.get("seed", 0)
        if item.path.stem in CORE and seed < CORE_SEEDS:
            item.add_marker("core")
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(needs_gpu)


@pytest.fixture(scope="module", autouse=True)
def _freeze_garbage_collector() -> None:
    """Exclude loaded modules from garbage collection, where torch and transformers would cost a sixth of all time."""
    gc.collect()
    gc.freeze()


IMPLEMENTATIONS = ("cpu", "triton")


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> str:
    """The two fast implementations of the same contract."""
    return request.param


def device_of(impl: str) -> torch.device:
    """The device that an implementation is tested on."""
    return torch.device("cuda" if HAS_GPU and impl == "triton" else "cpu")


@pytest.fixture
def device(impl: str) -> torch.device:
    """The device of `impl`."""
    return device_of(impl)


def draw_on(device: torch.device) -> SimpleNamespace:
    """Seeded numbers, the same for every device: normal(*shape), uniform(*shape), integers(high, *shape)."""
    generator = torch.Generator().manual_seed(2404_19737)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    def uniform(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.rand(shape, generator=generator) + 0.1).to(device, dtype)

    def integers(high: int, *shape: int, low: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device, dtype)

    return SimpleNamespace(normal=normal, uniform=uniform, integers=integers, generator=generator)


@pytest.fixture
def draw(device: torch.device) -> SimpleNamespace:
    """`draw_on` the device of `impl`."""
    return draw_on(device)


Given = Tensor | Sequence[Tensor]
# How the linear path cuts its rows into chunks. No result depends on it.
CHUNKING = ("chunk_bytes", "grad_dtype", "drop_dead_rows")


def evaluate(
    impl: str,
    given: Given,
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    unembed: Tensor | None = None,
    bias: Tensor | None = None,
    frozen: Sequence[str] = (),
    upstream: Tensor | float | None = None,
    weights_gradient: bool = True,
    **options: Any,
) -> SimpleNamespace:
    """loss, stats and gradients of leaves over the caller's own memory: of logits, or of hidden states with `unembed`.

    d_logits and d_hidden are lists, one for each tensor given; d_unembed, d_bias and d_token_weights are tensors. None
    where there is no such input, or where it is named in `frozen`.
    """
    from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce

    several = not isinstance(given, Tensor)
    source = "logits" if unembed is None else "hidden"
    tensors = {source: [*given] if several else [given], "unembed": [unembed], "bias": [bias]}
    tensors["token_weights"] = [token_weights]
    still = {*frozen} if weights_gradient else {*frozen, "token_weights"}
    leaves = {
        name: [x.detach().requires_grad_(name not in still) for x in group]
        for name, group in tensors.items()
        if group[0] is not None
    }
    weights = leaves.get("token_weights", [None])[0]
    first = leaves[source] if several else leaves[source][0]
    if unembed is None:
        loss, stats = weighted_mtp_ce(first, labels, weights, impl=impl, return_stats=True, **options)
    else:
        loss, stats = weighted_mtp_linear_ce(
            first, leaves["unembed"][0], labels, weights,
            bias=leaves.get("bias", [None])[0], impl=impl, return_stats=True, **options,
        )  # fmt: skip
    if upstream is None:
        upstream = torch.ones_like(loss)
    elif not isinstance(upstream, Tensor):
        upstream = torch.full_like(loss, upstream)
    wanted = {name: group for name, group in leaves.items() if name not in still}
    flat = [x for group in wanted.values() for x in group]
    rest = iter(torch.autograd.grad(loss, flat, upstream.to(loss.dtype)) if flat else ())
    found = {name: [next(rest) for _ in group] for name, group in wanted.items()}
    return SimpleNamespace(
        loss=loss.detach(),
        stats=stats,
        **{f"d_{name}": found.get(name) for name in ("logits", "hidden")},
        **{f"d_{name}": found.get(name, [None])[0] for name in ("unembed", "bias", "token_weights")},
    )


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [_double(item) for item in value] if isinstance(value, (list, tuple)) else value


def _positive(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) else abs(value) if isinstance(value, float) else value


def _is_positive(value: Any) -> bool:
    return value is None or bool(torch.as_tensor(value >= 0).all())


def _largest(values: Tensor | None) -> float:
    values = torch.zeros(1) if values is None else values[values.isfinite()]
    return float(values.abs().max()) if values.numel() else 0.0


def _error(got: Tensor, exact: Tensor) -> float:
    """The largest distance; infinite where got is not finite and exact is, or the other way round."""
    same = (got == exact) | (got.isnan() & exact.isnan())
    distance = torch.where(same, 0.0, (got.double() - exact.double()).abs())
    return float(distance.nan_to_num(math.inf).max()) if distance.numel() else 0.0


def _heads(given: Given) -> list[Tensor]:
    """H tensors [B,S,V] or [B,S,D]."""
    if not isinstance(given, Tensor):
        return [*given]
    return [*given.unbind(2)] if given.dim() == 4 else [given]


def _rounding_units(
    exact: SimpleNamespace, size: SimpleNamespace, weights: Any, options: Any, logits: Given
) -> dict[str, float]:
    """Return the magnitude whose last bit bounds each result. `size` is the result with every term made positive.

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


def _units_of_products(
    units: dict[str, float], hidden: list[Tensor], unembed: Tensor, bias: Tensor | None, d_logits: list[Tensor]
) -> dict[str, float]:
    """The units of the linear path, from those of its logits and from their exact gradient.

    A product carries the last bit of the sum of its terms' sizes, however small their sum is. A logit's reaches every
    result that the logit does.
    """
    x, g = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in (hidden, d_logits))  # [N, D], [N, V]
    logit = _largest(x.abs() @ unembed.abs().T) + _largest(bias)
    lone = units["d_logits"]
    return {
        **{name: units[name] * (1 + logit) for name in ("loss", "d_token_weights")},
        **{name: units[name] + logit for name in ("ce", "lse")},
        "d_hidden": (1 + logit) * (_largest(g.abs() @ unembed.abs()) + lone * _largest(unembed)),
        "d_unembed": (1 + logit) * (_largest(g.abs().T @ x.abs()) + lone * _largest(x)),
        "d_bias": (1 + logit) * (_largest(g.abs().sum(0)) + lone),
    }


def _assert_masked_rows_are_zero(got: SimpleNamespace, exact: SimpleNamespace) -> None:
    masked = exact.stats.top1 < 0
    assert bool((got.stats.top1[masked] == -1).all()), "top1 of a masked row is not -1"
    for name in ("ce", "lse"):
        assert bool((getattr(got.stats, name)[masked] == 0).all()), f"{name} of a masked row is not 0"
    gradients = got.d_logits or got.d_hidden
    if gradients is None:
        return
    for h, gradient in enumerate(_heads(gradients if len(gradients) > 1 else gradients[0])):
        assert bool((gradient[masked[:, :, h]] == 0).all()), f"a masked row of head {h} has a gradient"


def _assert_top1_is_the_largest(
    got: SimpleNamespace, exact: SimpleNamespace, heads: list[Tensor], softcap: Any, slack: float
) -> None:
    """Of logits that are exact but for `slack`."""
    for h, head in enumerate(heads):
        read = (exact.stats.top1[:, :, h] >= 0) & ~head.isnan().any(-1)
        z = head[read].double()
        chosen = z.gather(-1, got.stats.top1[:, :, h][read].long()[:, None])[:, 0]
        largest = z.amax(-1)
        if softcap is not None:
            # Distinct logits can meet in one fp32 number under the cap.
            chosen, largest = (softcap * torch.tanh(x / softcap) for x in (chosen, largest))
            largest = largest - 1e-6 * largest.abs()
        assert bool((chosen >= largest - slack).all()), f"top1 of head {h} is not the largest logit"


def evaluate_peer(given: Given, labels: Tensor, token_weights: Tensor | None, **options: Any) -> SimpleNamespace:
    """Return the results of eager torch on the same inputs.

    torch.nn.functional.linear of a strided input rounds once more for the bias: it gets copies, and so rounds each
    logit once, as the chunks do.
    """
    if "unembed" not in options:
        return evaluate("reference", given, labels, token_weights, **options)
    options |= {name: options[name].contiguous() for name in ("unembed", "bias") if options.get(name) is not None}
    peer = evaluate("reference", [x.contiguous() for x in _heads(given)], labels, token_weights, **options)
    if peer.d_hidden is not None and isinstance(given, Tensor):
        peer.d_hidden = [torch.stack(peer.d_hidden, dim=2).view(given.shape)]
    return peer


def expect(given: Given, labels: Tensor, token_weights: Tensor | None = None, **options: Any) -> SimpleNamespace:
    """Return what any implementation is held against: the oracle's results, eager torch's, and the units of rounding.

    The arguments are those of `evaluate`. Eager torch is impl="reference" at the same dtype.
    """
    options = {"upstream": None} | {name: value for name, value in options.items() if name not in CHUNKING}
    peer = evaluate_peer(given, labels, token_weights, **options)
    options.pop("logits_dtype", None)  # float64 is exact in any
    wide_given, wide_weights = _double(given), _double(token_weights)
    wide = {name: _double(value) for name, value in options.items()}
    exact = evaluate("reference", wide_given, labels, wide_weights, **wide)
    positive = {**wide, "upstream": _positive(wide["upstream"])}
    size = exact
    if not (_is_positive(wide_weights) and _is_positive(wide["upstream"])):
        size = evaluate("reference", wide_given, labels, _positive(wide_weights), **positive)

    first = given if isinstance(given, Tensor) else given[0]
    bit = UNITS_IN_LAST_PLACE * torch.finfo(peer.loss.dtype).eps
    heads, slack = _heads(wide_given), 0.0
    if "unembed" in options:
        of_layer = {name: wide.pop(name, None) for name in ("unembed", "bias", "frozen")}
        hidden, unembed, bias = heads, of_layer["unembed"], of_layer["bias"]
        heads = [torch.nn.functional.linear(x, unembed, bias) for x in hidden]
        on_logits = evaluate("reference", heads, labels, wide_weights, **wide)
        units = _rounding_units(exact, size, wide_weights, wide, heads)
        units = _units_of_products(units, hidden, unembed, bias, on_logits.d_logits)
        # Two logits that meet when they are rounded to the dtype of hidden.
        slack = 2 * torch.finfo(first.dtype).eps * max(_largest(head) for head in heads) + bit * units["lse"]
    else:
        units = _rounding_units(exact, size, wide_weights, wide, wide_given)
    units = {name: bit * unit for name, unit in units.items()}
    return SimpleNamespace(
        peer=peer, exact=exact, units=units, heads=heads, slack=slack, softcap=wide.get("softcap"), dtype=first.dtype,
        of_products="unembed" in options,
    )  # fmt: skip


def _results(outcome: SimpleNamespace) -> dict[str, Tensor]:
    named = {"loss": outcome.loss, "ce": outcome.stats.ce, "lse": outcome.stats.lse}
    for name in ("d_logits", "d_hidden"):
        named |= {f"{name}[{i}]": gradient for i, gradient in enumerate(getattr(outcome, name) or [])}
    alone = {name: getattr(outcome, name) for name in ("d_unembed", "d_bias", "d_token_weights")}
    return named | {name: gradient for name, gradient in alone.items() if gradient is not None}


def assert_errs_no_more_than_torch(got: SimpleNamespace, expected: SimpleNamespace) -> None:
    """Assert that no result's error is above three times that of eager torch, and a few units in the last place."""
    exact = expected.exact
    assert got.loss.dtype == (torch.float64 if expected.dtype == torch.float64 else torch.float32)
    assert torch.equal(got.stats.live, exact.stats.live)
    ours, theirs, truth = _results(got), _results(expected.peer), _results(exact)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert value.shape == truth[name].shape, name
        assert value.dtype == theirs[name].dtype, name
        error, allowed = _error(value, truth[name]), 3 * _error(theirs[name], truth[name])
        allowed += expected.units[name.partition("[")[0]]
        if expected.of_products and value.dtype != got.loss.dtype:
            # A half gradient is rounded twice: as a product, and scaled.
            allowed += torch.finfo(value.dtype).eps * _largest(truth[name])
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, of {_largest(truth[name]):.3e}"
    _assert_masked_rows_are_zero(got, exact)
    _assert_top1_is_the_largest(got, exact, expected.heads, expected.softcap, expected.slack)


def compare(
    impl: str, given: Given, labels: Tensor, token_weights: Tensor | None = None, **options: Any
) -> SimpleNamespace:
    """Assert that impl errs at most three times as much as eager torch, in every result; return impl's results."""
    got = evaluate(impl, given, labels, token_weights, **options)
    assert_errs_no_more_than_torch(got, expect(given, labels, token_weights, **options))
    return got


def _describe(case: SimpleNamespace) -> str:
    """Return the case, one line for each part."""

    def shown(value: Any) -> str:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return f"{len(value)} x {shown(value[0])}"
        if isinstance(value, Tensor):
            return f"{value.dtype} {list(value.shape)} strides {list(value.stride())}"
        return repr(value)

    parts = {"given": case.given, "labels": case.labels, "token_weights": case.weights, **case.options}
    return "\n".join(f"{name}: {shown(value)}" for name, value in parts.items())


def compare_all(
    draw_case: Callable[[SimpleNamespace], SimpleNamespace],
) -> Iterator[tuple[str, SimpleNamespace, SimpleNamespace]]:
    """`compare` every implementation on a case; yield its name, the case and its results.

    What it is held against is computed once for each device. An error has the case as its note.

    Args:
        draw_case: draws given, labels, weights and options on the device of a `draw`.
    """
    drawn: dict[torch.device, tuple[SimpleNamespace, SimpleNamespace]] = {}
    for impl in IMPLEMENTATIONS:
        device = device_of(impl)
        if device not in drawn:
            case = draw_case(draw_on(device))
            drawn[device] = case, expect(case.given, case.labels, case.weights, **case.options)
        case, expected = drawn[device]
        try:
            got = evaluate(impl, case.given, case.labels, case.weights, **case.options)
            assert_errs_no_more_than_torch(got, expected)
            yield impl, case, got
        except Exception as error:
            error.add_note(f"impl: {impl}\n{_describe(case)}")
            raise


@pytest.fixture(name="evaluate")
def evaluate_fixture() -> Callable[..., SimpleNamespace]:
    """The function `evaluate` of this file."""
    return evaluate


@pytest.fixture(name="compare_all")
def compare_all_fixture() -> Callable[..., Iterator[tuple[str, SimpleNamespace, SimpleNamespace]]]:
    """The function `compare_all` of this file."""
    return compare_all


@pytest.fixture(name="compare")
def compare_fixture(impl: str) -> Callable[..., SimpleNamespace]:
    """The function `compare` of this file, for `impl`."""
    return lambda *tensors, **options: compare(impl, *tensors, **options)


@pytest.fixture(name="expect")
def expect_fixture() -> Callable[..., SimpleNamespace]:
    """The function `expect` of this file."""
    return expect


@pytest.fixture(name="assert_errs")
def assert_errs_fixture() -> Callable[..., None]:
    """The function `assert_errs_no_more_than_torch` of this file."""
    return assert_errs_no_more_than_torch


@pytest.fixture(name="draw_on")
def draw_on_fixture() -> Callable[[torch.device], SimpleNamespace]:
    """The function `draw_on` of this file."""
    return draw_on
