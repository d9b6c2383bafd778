"""One case: its check against the oracle, its peak memory, its timed rounds, its entry in the results.

Time      pytest-benchmark's rounds, with a fresh copy of the inputs before each. On a GPU its timer reads CUDA events,
          and each round starts with a cold L2 cache. What disturbs a round only makes it longer: ratios are of p20.

Memory    The peak above the inputs, gradients included. GPU: of torch's allocator. CPU: of the resident size of this
          process, in its second run of a provider, so that libraries and compiled code are loaded.

Ceiling   Logits: a copy of the bytes that the loss must move, at the bandwidth of this session. Linear: the bare
          products, timed as a provider of the same shape.

No case is timed whose results are further from the float64 oracle than oracle.py allows.
"""

import ctypes
import gc
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import oracle, results
from benchmarks.cases import Case
from benchmarks.providers import AbsentError, Provider, operands
from benchmarks.shapes import Inputs, Shape, make_inputs
from mtp_ce.kernels import backward, forward

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
COPY_BYTES = 2**31 if HAS_GPU else 2**28
# Copies that warm the device up, half a second of them on an H100 that was idle, and copies that are timed.
WARM_UP, COPIES = (300, 50) if HAS_GPU else (2, 12)
# Twenty times the L2 cache of an H100, and half a millisecond in which the host runs ahead.
FLUSH_BYTES = 2**30
# Seconds for the rounds of a case, and the fewest and the most rounds.
SECONDS, FEWEST, MOST = (0.3, 10, 50) if HAS_GPU else (1.0, 4, 12)


class WrongResultError(Exception):
    """This project is further from the oracle than the rule allows, and is not timed."""


class Instant:
    """A CUDA event at the present end of the stream; the difference of two is in seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Instant") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock() -> Any:
    """Return the present instant of the device: the timer that pytest-benchmark is given."""
    return Instant() if HAS_GPU else time.perf_counter()


def copy_bandwidth() -> float:
    """Return bytes per second, read and written, of a copy between two large buffers: p20."""
    source = torch.ones(COPY_BYTES // 4, dtype=torch.float32, device=DEVICE)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(WARM_UP + COPIES):
        start = clock()
        target.copy_(source)
        end = clock()
        seconds.append(end - start)
    return 2 * COPY_BYTES / results.percentile(seconds[WARM_UP:], 0.2)


def others_cpu() -> Callable[[], float]:
    """Return a function that returns the fraction of the CPU used by other processes since; 0 where a GPU is timed."""

    def busy() -> float:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
        return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - time.process_time()

    start, before = time.monotonic(), busy()

    def fraction() -> float:
        used = (busy() - before) / (time.monotonic() - start) / (os.cpu_count() or 1)
        return 0.0 if HAS_GPU else round(max(0.0, used), 3)

    return fraction


def _resident(mark: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(mark + ":"))


def reset_peak() -> int:
    """Start a new peak of memory; returns the bytes in use."""
    gc.collect()
    if HAS_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Memory that was freed goes back to the system, so that using it again counts.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak() -> int:
    """Return the peak of memory since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if HAS_GPU else _resident("VmHWM")


class Checked(NamedTuple):
    """What is known of a provider before it is timed."""

    errors: dict[str, oracle.Error]
    forward_bytes: int
    both_bytes: int  # of backward too, which keeps what forward left
    seconds: float  # of a whole run


@dataclass
class Problem:
    """A shape with its inputs, the oracle's results, and what became of each provider."""

    shape: Shape
    inputs: Inputs
    outcomes: dict[str, Checked | Exception] = field(default_factory=dict)
    truths: dict[bool, list[oracle.Expected]] = field(default_factory=dict)

    def truth(self, weighted: bool) -> list[oracle.Expected]:
        """Return the oracle's results, computed when first asked for."""
        if weighted not in self.truths:
            self.truths[weighted] = oracle.find_truth(self.shape, self.inputs, weighted)
        return self.truths[weighted]


def run_once(provider: Provider, inputs: Inputs) -> oracle.Results:
    """Return every result by its name: the loss and the gradients, or the cross entropies of the rows."""
    values = inputs.fresh()
    with torch.set_grad_enabled(inputs.has_gradient):
        result = provider.run(*values, *inputs.rest)
    if not inputs.has_gradient:
        return {"ce": result}
    gradients = torch.autograd.grad(result, values)
    named = {f"d_{name}": gradient for name, gradient in zip(inputs.values, gradients, strict=True)}
    return {"loss": result.detach(), **named}


def check(provider: Provider, problem: Problem) -> Checked:
    """Compare a provider with the oracle, and measure its memory.

    Raises:
        WrongResultError: This project is wrong.
        AbsentError: A peer is wrong, or cannot run here.
    """
    missing = provider.missing(problem.shape, DEVICE)
    if missing is not None:
        raise AbsentError(missing)
    if provider.ceiling:
        return Checked({}, 0, 0, 0.0)
    unit_of = problem.shape.torch_dtype if provider.rounds else torch.float32
    errors = oracle.check(problem.truth(provider.weighted), run_once(provider, problem.inputs), unit_of)
    for name, error in errors.items():
        if not error.acceptable:
            words = f"wrong {name}: error {error.distance:.3g}, allowed {error.allowed:.3g}"
            raise WrongResultError(f"{provider.name}: {words}") if provider.ours else AbsentError(words)
    return measure_memory(provider, problem.inputs)._replace(errors=errors)


def measure_memory(provider: Provider, inputs: Inputs) -> Checked:
    """Return the peak memory of a second run, which no longer compiles, and its duration."""
    values = inputs.fresh()
    before = reset_peak()
    start = clock()
    with torch.set_grad_enabled(inputs.has_gradient):
        result = provider.run(*values, *inputs.rest)
    forward_bytes = peak() - before
    gradients = torch.autograd.grad(result, values) if inputs.has_gradient else None
    both_bytes, end = peak() - before, clock()
    del result, gradients
    return Checked({}, forward_bytes, both_bytes, end - start)


class Session:
    """The run that is being measured, written after every case where it has a path."""

    def __init__(self, run: results.Run, path: Path | None, older: list[results.Run], deadline: float) -> None:
        self.run = run
        self.path = path
        self.older = older
        self.deadline = deadline
        self._problem: Problem | None = None

    def skip_after_deadline(self) -> None:
        """Skip the test where no time is left."""
        if time.monotonic() > self.deadline:
            pytest.skip("not reached within --time-limit")

    def problem(self, shape: Shape) -> Problem:
        """Return the problem of a shape; the one before it is freed."""
        if self._problem is None or self._problem.shape != shape:
            self._problem = None
            if HAS_GPU:
                torch.cuda.empty_cache()
            # Compiled code of another shape counts against torch's limit of recompilations.
            torch._dynamo.reset()
            self._problem = Problem(shape, make_inputs(shape, DEVICE))
        return self._problem

    def checked(self, provider: Provider, problem: Problem) -> Checked:
        """Check a provider once for all of its passes; a failure is raised again for each."""
        if provider.name not in problem.outcomes:
            try:
                problem.outcomes[provider.name] = check(provider, problem)
            except Exception as error:
                # The frames of the traceback would keep gigabytes of tensors alive.
                traceback.clear_frames(error.__traceback__)
                problem.outcomes[provider.name] = error
        outcome = problem.outcomes[provider.name]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def products_seconds(self, shape: Shape) -> float | None:
        """Return p20 of the bare products of a shape; None where this run has not timed them."""
        wanted = shape.as_dict()
        timed = [case for case in self.run["cases"] if case["shape"] == wanted]
        return next((case["p20_ms"] / 1e3 for case in timed if case["provider"] == "bare_products"), None)

    def measure(self, case: Case, benchmark: BenchmarkFixture) -> str:
        """Check, time and record one case; returns its time in words.

        An absent peer is recorded with its reason, and the test is skipped.
        """
        entries = (*self.run["cases"], *self.run["absent"])
        if results.key(self.entry(case)) in map(results.key, entries):
            pytest.skip("in the resumed run")
        self.skip_after_deadline()
        benchmark.group = f"{case.shape.path} {case.shape} {case.which}"
        try:
            return self._measure(case, benchmark)
        except Exception as error:
            reason = str(error) if isinstance(error, AbsentError) else f"{type(error).__name__}: {error}"
            reason = (reason.splitlines() or [""])[0][:160]
            broken = is_broken()
            if broken or not case.provider.ours:
                reason = f"broke the GPU: {reason}" if broken else reason
                self.add("absent", case, reason=reason)
            if broken:
                # Every later case would fail too. With --resume the next call leaves this one out.
                pytest.exit(f"{case.provider.name} {reason}", returncode=pytest.ExitCode.TESTS_FAILED)
            if case.provider.ours and not isinstance(error, AbsentError):
                raise
            pytest.skip(reason)

    def _measure(self, case: Case, benchmark: BenchmarkFixture) -> str:
        shape, which, provider = case
        problem = self.problem(shape)
        checked = self.checked(provider, problem)
        prepare, call = calls(provider, which, problem)
        held: list[Any] = []

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            # The results of the round before are freed here, outside the timed region.
            held.clear()
            return prepare(), {}

        rounds = min(max(int(SECONDS / max(checked.seconds, 1e-9)), FEWEST), MOST)
        if provider.ceiling:
            rounds = FEWEST
        others = others_cpu()
        benchmark.pedantic(
            lambda *inputs: held.append(call(*inputs)), setup=setup, rounds=rounds, warmup_rounds=int(provider.ceiling)
        )
        others_used = others()
        held.clear()
        if benchmark.disabled:
            return "not timed"
        seconds = benchmark.stats.stats.data
        if shape.path == "logits":
            work = {"bytes": bytes_moved(shape, which)}
            ceiling = work["bytes"] / self.run["copy_bytes_per_s"]
        else:
            work = {"operations": shape.operations}
            ceiling = results.percentile(seconds, 0.2) if provider.ceiling else self.products_seconds(shape)
        timing = results.timing(seconds, ceiling)
        peak_bytes = checked.forward_bytes if which == "forward" else checked.both_bytes
        self.add(
            "cases", case, **timing, **work, others_cpu=others_used,
            peak_bytes=peak_bytes,
            errors={name: error._asdict() for name, error in checked.errors.items()},
        )  # fmt: skip
        share = timing["share_of_ceiling"]
        words = f"{timing['p20_ms']:.4g} ms" + (f", {share:.0%} of the ceiling" if share else "")
        return words + ("" if provider.ceiling else f", {peak_bytes / 2**20:.0f} MiB")

    @staticmethod
    def entry(case: Case) -> dict[str, Any]:
        """Return what identifies a case in the results."""
        return {"provider": case.provider.name, "pass": case.which, "shape": case.shape.as_dict()}

    def add(self, part: str, case: Case, **figures: Any) -> None:
        """Append an entry to "cases" or "absent", and save the run."""
        self.run[part].append({**self.entry(case), **figures})
        self.save()

    def save(self) -> None:
        """Write the run to its file, where it has one."""
        if self.path is not None:
            results.write(self.path, results.merged(self.older, self.run))


def is_broken() -> bool:
    """Whether the GPU takes no more work in this process."""
    try:
        if HAS_GPU:
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


def bytes_moved(shape: Shape, which: str) -> int:
    """Bytes that a loss of logits must move, by the `traffic` of the kernels."""
    itemsize = shape.torch_dtype.itemsize
    down = sum(forward.traffic(shape.valid_rows, shape.B * shape.S, shape.H, shape.V, itemsize))
    back = sum(backward.traffic(shape.valid_rows, shape.rows, shape.V, itemsize))
    return {"forward": down, "backward": back, "both": down + back}[which]


def calls(provider: Provider, which: str, problem: Problem) -> tuple[Callable[[], tuple[Any, ...]], Callable[..., Any]]:
    """Return what makes the arguments of a round, outside the timed region, and the timed function of them."""
    inputs = problem.inputs

    def forward(*values: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(inputs.has_gradient):
            return provider.run(*values, *inputs.rest)

    def both(*values: torch.Tensor) -> Any:
        return torch.autograd.grad(forward(*values), values)

    def backward(loss: torch.Tensor, *values: torch.Tensor) -> Any:
        return torch.autograd.grad(loss, values)

    def prepare() -> tuple[Any, ...]:
        values = products if provider.ceiling else inputs.fresh()
        arguments = (forward(*values), *values) if which == "backward" else values
        if HAS_GPU:
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE).zero_()
        return arguments

    products = operands(problem.shape, inputs) if provider.ceiling else ()
    passes = {"forward": forward, "both": both, "backward": backward}
    return prepare, provider.run if provider.ceiling else passes[which]
