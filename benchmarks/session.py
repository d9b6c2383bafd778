"""One benchmark session: the problem at hand, the check and the memory of each provider on it, and the record."""

import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import memory, oracle, results, resume, rounds
from benchmarks.clock import DEVICE, HAS_GPU, LostDeviceError, busy_elsewhere, hold_on
from benchmarks.plan import Case
from benchmarks.provider import NOT_REACHED, AbsentError, Provider
from benchmarks.shapes import Inputs, Shape, make_inputs


class WrongResultError(Exception):
    """This project is further from the oracle than the rule allows: it is not timed."""


class Qualified(NamedTuple):
    """A provider that may be timed."""

    errors: dict[str, oracle.Error]
    peak: Callable[[], memory.Peak]  # waits where it is being measured


@dataclass
class Problem:
    """A shape with its tensors, the oracle's results, and what became of each provider on it."""

    shape: Shape
    inputs: Inputs
    outcomes: dict[str, Qualified | Exception] = field(default_factory=dict)
    # Of the loss, and of the plain mean over rows, each when it is first asked for.
    truths: dict[bool, list[oracle.Expected]] = field(default_factory=dict)
    # Seconds of the rounds of every provider, of a pass, that were timed in turns.
    seconds: dict[tuple[str, int], dict[str, list[float]]] = field(default_factory=dict)
    # Share of the CPU that other processes took meanwhile.
    others: dict[tuple[str, int], float] = field(default_factory=dict)

    def truth(self, weighted: bool) -> list[oracle.Expected]:
        """The oracle's results."""
        if weighted not in self.truths:
            self.truths[weighted] = oracle.find_truth(self.shape, self.inputs, weighted)
        return self.truths[weighted]


def run_once(provider: Provider, inputs: Inputs) -> oracle.Results:
    """Every result by its name: the loss and the gradients, or the rows' cross entropies."""
    values = inputs.fresh()
    if not inputs.has_gradient:
        with torch.no_grad():
            return {"ce": provider.run(*values, *inputs.rest)}
    loss = provider.run(*values, *inputs.rest)
    gradients = torch.autograd.grad(loss, values)
    named = {f"d_{name}": gradient for name, gradient in zip(inputs.values, gradients, strict=True)}
    return {"loss": loss.detach(), **named}


def failure(provider: Provider, error: Exception) -> Exception:
    """What an exception of a provider means: ours is itself, a peer's an absence with its first line."""
    if provider.ours:
        return error
    words = str(error).strip().splitlines() or [""]
    return AbsentError(f"{type(error).__name__}: {words[0][:160]}")


def examine(provider: Provider, problem: Problem) -> Qualified | Exception:
    """Run, check and measure the memory of a provider; an exception is an outcome here, for every pass to raise."""
    missing = provider.missing(problem.shape, DEVICE)
    if missing is not None:
        return AbsentError(missing)
    if provider.ceiling:
        return Qualified({}, lambda: memory.Peak(0, 0))
    truth = problem.truth(provider.weighted)
    try:
        return _checked(provider, problem, truth)
    except (AbsentError, WrongResultError) as error:
        return error
    except Exception as error:
        # The frames of the traceback would keep gigabytes of tensors alive.
        traceback.clear_frames(error.__traceback__)
        hold_on(provider.name, error)
        return failure(provider, error)


def _checked(provider: Provider, problem: Problem, truth: list[oracle.Expected]) -> Qualified:
    found = run_once(provider, problem.inputs)
    if HAS_GPU:
        torch.cuda.synchronize()
    errors = oracle.check(truth, found, problem.shape.torch_dtype if provider.rounds else torch.float32)
    del found
    for name, (distance, allowed) in errors.items():
        if not errors[name].acceptable:
            words = f"is wrong: its {name} errs by {distance:.3g}, and {allowed:.3g} is allowed"
            raise WrongResultError(f"{provider.name} {words}") if provider.ours else AbsentError(words)
    if HAS_GPU:
        peak = memory.measure_gpu(provider, problem.inputs)
        return Qualified(errors, lambda: peak)
    return Qualified(errors, memory.begin_cpu(problem.shape, provider.name).result)


class Session:
    """The run that is being measured, written after every case where it has a path."""

    def __init__(
        self,
        run: results.Run,
        path: Path | None,
        deadline: float = float("inf"),
        selected: Sequence[Case] = (),
        resumed: Sequence[results.Run] = (),
    ) -> None:
        self.run = run
        self.path = path
        self.deadline = deadline
        self.selected = selected
        self.resumed = resumed
        self.older = results.read(path) if path is not None else []
        self._problem: Problem | None = None
        self._ceilings: dict[Shape, float] = {}

    def look_at_the_time(self) -> None:
        """AbsentError where none is left."""
        if time.monotonic() > self.deadline:
            raise AbsentError(NOT_REACHED)

    def problem(self, shape: Shape) -> Problem:
        """The problem of a shape; the one before it is dropped. AbsentError where no time is left for a new one."""
        if self._problem is None or self._problem.shape != shape:
            self.look_at_the_time()
            self._problem = None
            if HAS_GPU:
                torch.cuda.empty_cache()
            # Compiled code of another shape counts against torch's limit of recompilations.
            torch._dynamo.reset()
            self._problem = Problem(shape, make_inputs(shape, DEVICE))
        return self._problem

    def qualify(self, provider: Provider, problem: Problem) -> Qualified:
        """A provider's errors and peak memory on a problem; raises what kept it from them."""
        if provider.name not in problem.outcomes:
            self.look_at_the_time()
            reason = resume.breaks(provider, problem.shape, self.resumed, DEVICE.type)
            if reason is not None:
                problem.outcomes[provider.name] = RuntimeError(reason) if provider.ours else AbsentError(reason)
            else:
                problem.outcomes[provider.name] = examine(provider, problem)
        outcome = problem.outcomes[provider.name]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def seconds(self, case: Case, problem: Problem) -> list[float]:
        """The rounds of a case, timed in turns with the others that were selected of its problem and pass.

        Those that the time was enough to qualify; none where there was no time left to begin with.
        """
        turn = case.which, case.place
        if turn not in problem.seconds:
            self.look_at_the_time()
            together = [
                other for other in self.selected if (other.shape, other.which, other.place) == (case.shape, *turn)
            ]
            problem.seconds[turn], problem.others[turn] = self._time(together, problem)
        # An exception of the rounds is the provider's outcome since.
        self.qualify(case.provider, problem)
        return problem.seconds[turn][case.provider.name]

    def _time(self, cases: list[Case], problem: Problem) -> tuple[dict[str, list[float]], float]:
        able: dict[str, Provider] = {}
        # Peers last: what one of them breaks, or the time that it takes, is not to be ours.
        for case in sorted(cases, key=lambda case: not (case.provider.ours or case.provider.ceiling)):
            try:
                self.qualify(case.provider, problem)
            except LostDeviceError:
                raise
            except Exception:
                # Raised again in the test of the provider that it belongs to.
                continue
            able[case.provider.name] = case.provider
        for name, provider in [*able.items()]:
            # Nothing else runs while the clock does.
            try:
                self.qualify(provider, problem).peak()
            except Exception as error:
                problem.outcomes[able.pop(name).name] = failure(provider, error)
        calls = {name: rounds.calls(able[name], cases[0].which, problem.shape, problem.inputs) for name in able}
        begin, busy = time.monotonic(), busy_elsewhere()
        outcomes = rounds.in_turns(calls)
        others = (busy_elsewhere() - busy) / (time.monotonic() - begin) / (os.cpu_count() or 1)
        seconds = {}
        for name, outcome in outcomes.items():
            if isinstance(outcome, Exception):
                problem.outcomes[name] = failure(able[name], outcome)
                continue
            seconds[name] = outcome
            if able[name].ceiling:
                self._ceilings[problem.shape] = results.percentile(sorted(outcome), 0.2)
        return seconds, round(max(0.0, others), 3)

    def ceiling(self, shape: Shape) -> float | None:
        """Seconds of the bare products of a shape, p20, where they were timed."""
        return self._ceilings.get(shape)

    def add(self, part: str, provider: str, which: str, shape: Shape, **entry: Any) -> None:
        """Put an entry under "cases" or "absent", and the run into its file."""
        self.run[part].append({"provider": provider, "pass": which, "shape": shape.as_dict(), **entry})
        self.save()

    def save(self) -> None:
        """Put the run into its file, where it has one."""
        if self.path is not None:
            results.write(self.path, results.merged(self.older, self.run))
