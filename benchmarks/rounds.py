"""The rounds of a problem's providers, in turns: one round of every provider, then the next of every provider.

A shared machine slows down in bursts of seconds: whoever is timed in one would lose to whoever is not, by a factor of 2
and more. In turns, a burst meets all of them; and as interference only ever lengthens a round, ratios are of p20.

pytest-benchmark runs one provider's rounds in one block. So the rounds are timed here, when the first provider of a
problem comes up, and pytest-benchmark reads the durations from `recorded`, a timer that moves on by one at a time.
"""

import gc
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import products
from benchmarks.clock import HAS_GPU, cool_caches, hold_on, timed
from benchmarks.provider import Provider
from benchmarks.shapes import Inputs, Shape

# Seconds for a provider's rounds on average, and the least and the most rounds.
SECONDS, LEAST, MOST = (0.3, 10, 50) if HAS_GPU else (0.5, 4, 10)

Prepare = Callable[[], tuple[Any, ...]]
Call = Callable[..., Any]


def calls(provider: Provider, which: str, shape: Shape, inputs: Inputs) -> tuple[Prepare, Call]:
    """What makes the arguments of a round, outside the timed region, and the timed function of them."""

    def forward(*values: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(inputs.has_gradient):
            return provider.run(*values, *inputs.rest)

    def both(*values: torch.Tensor) -> Any:
        return torch.autograd.grad(forward(*values), values)

    def backward(loss: torch.Tensor, *values: torch.Tensor) -> Any:
        return torch.autograd.grad(loss, values)

    def prepare() -> tuple[Any, ...]:
        values = products.operands(shape, inputs) if provider.ceiling else inputs.fresh()
        arguments = (forward(*values), *values) if which == "backward" else values
        cool_caches()
        return arguments

    if provider.ceiling:
        return prepare, provider.run
    by_pass: dict[str, Call] = {"forward": forward, "backward": backward, "both": both}
    return prepare, by_pass[which]


def in_turns(by_name: dict[str, tuple[Prepare, Call]]) -> dict[str, list[float] | Exception]:
    """Seconds of every provider's rounds, as many for each; or what one of them raised, which ends its rounds.

    LostDeviceError where that has ended everybody's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in by_name}
    failed: dict[str, Exception] = {}

    def lap() -> None:
        for name, (prepare, call) in by_name.items():
            if name not in failed:
                try:
                    seconds[name].append(timed(call, *prepare()))
                except Exception as error:
                    # The frames of the traceback would keep gigabytes of tensors alive.
                    traceback.clear_frames(error.__traceback__)
                    hold_on(name, error)
                    failed[name] = error

    gc.collect()
    gc.disable()
    try:
        # Nobody is cold in the first lap: who is timed has passed its check.
        lap()
        first = sum(duration for durations in seconds.values() for duration in durations)
        for _ in range(min(max(int(SECONDS * len(by_name) / max(first, 1e-9)), LEAST), MOST) - 1):
            lap()
    finally:
        gc.enable()
    return {**seconds, **failed}


_readings: Iterator[float] = iter(())


def recorded() -> float:
    """A timer for pytest-benchmark: successive pairs of readings are apart by what `replay` was given."""
    return next(_readings)


def replay(seconds: list[float]) -> None:
    """Wind `recorded` up."""
    global _readings
    _readings = iter([reading for duration in seconds for reading in (0.0, duration)])
