"""One benchmark session: the problem at hand, the check and the memory of each provider on it, and the record."""

import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import memory, oracle, results
from benchmarks.clock import DEVICE, HAS_GPU
from benchmarks.providers import Provider
from benchmarks.shapes import Inputs, Shape, make_inputs


class AbsentError(Exception):
    """A provider that cannot run a case on this machine, with the reason."""


class WrongResultError(Exception):
    """A provider that is further from the oracle than the rule allows: it is not timed."""


class Qualified(NamedTuple):
    """A provider that may be timed."""

    errors: oracle.Errors
    peak: memory.Peak


@dataclass
class Problem:
    """A shape with its tensors, the oracle's results, and what became of each provider on it."""

    shape: Shape
    inputs: Inputs
    truth: oracle.Truth
    outcomes: dict[str, Qualified | Exception] = field(default_factory=dict)


def run_once(provider: Provider, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Loss and d_logits, finished."""
    logits = inputs.fresh_logits()
    loss = provider.loss(logits, inputs.labels, inputs.token_weights)
    (d_logits,) = torch.autograd.grad(loss, logits)
    if HAS_GPU:
        torch.cuda.synchronize()
    return loss, d_logits


def examine(provider: Provider, problem: Problem) -> Qualified | Exception:
    """Run, check and measure the memory of a provider; an exception is an outcome here, for every pass to raise."""
    missing = provider.missing(DEVICE)
    if missing is not None:
        return AbsentError(missing)
    try:
        loss, d_logits = run_once(provider, problem.inputs)
    except Exception as error:
        # The frames of the traceback would keep gigabytes of tensors alive.
        traceback.clear_frames(error.__traceback__)
        if provider.ours:
            return error
        words = str(error).strip().splitlines() or [""]
        return AbsentError(f"{type(error).__name__}: {words[0][:160]}")
    rounded = problem.shape.torch_dtype if provider.rounds_rows else torch.float32
    errors = oracle.check(problem.truth, loss, d_logits, rounded)
    if not errors.acceptable:
        return WrongResultError(f"{provider.name} is not timed, for its result is wrong: {errors}")
    del loss, d_logits
    if HAS_GPU:
        return Qualified(errors, memory.measure_gpu(provider.loss, problem.inputs))
    return Qualified(errors, memory.measure_cpu(problem.shape, provider.name))


class Session:
    """The run that is being measured, written after every case where it has a path."""

    def __init__(self, run: results.Run, path: Path | None, deadline: float = float("inf")) -> None:
        self.run = run
        self.path = path
        self.deadline = deadline
        self.older = results.read(path) if path is not None else []
        self._problem: Problem | None = None

    def problem(self, shape: Shape) -> Problem:
        """The problem of a shape; the one before it is dropped. AbsentError where time has run out."""
        if time.monotonic() > self.deadline:
            raise AbsentError("not reached in the time given")
        if self._problem is None or self._problem.shape != shape:
            self._problem = None
            if HAS_GPU:
                torch.cuda.empty_cache()
            # Compiled code of another shape counts against torch's limit of recompilations.
            torch._dynamo.reset()
            inputs = make_inputs(shape, DEVICE)
            self._problem = Problem(shape, inputs, oracle.find_truth(shape, inputs))
        return self._problem

    def qualify(self, provider: Provider, problem: Problem) -> Qualified:
        """A provider's errors and peak memory on a problem; raises what kept it from them."""
        if provider.name not in problem.outcomes:
            problem.outcomes[provider.name] = examine(provider, problem)
        outcome = problem.outcomes[provider.name]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def add(self, part: str, provider: Provider, which: str, shape: Shape, **entry: Any) -> None:
        """Put an entry under "cases" or "absent", and the run into its file."""
        self.run[part].append({"provider": provider.name, "pass": which, "shape": shape.as_dict(), **entry})
        if self.path is not None:
            results.write(self.path, results.merged(self.older, self.run))
