"""The rounds of a problem's providers, in turns: one round of every provider, then the next of every provider.

A shared machine slows down in bursts of seconds: whoever is timed in one would lose to whoever is not, by a factor of 2
and more. In turns, a burst meets all of them; and as interference only ever lengthens a round, ratios are of p20.

pytest-benchmark runs one provider's rounds in one block. So the rounds are timed here, when the first provider of a
problem comes up, and pytest-benchmark reads the durations from `recorded`, a timer that moves on by one at a time.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import products
from benchmarks.clock import HAS_GPU, cool_caches, timed
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
    return prepare, {"forward": forward, "backward": backward, "both": both}[which]


def in_turns(by_name: dict[str, tuple[Prepare, Call]]) -> dict[str, list[float]]:
    """Seconds of every provider's rounds; as many for each."""

    def lap() -> Iterator[float]:
        for prepare, call in by_name.values():
            yield timed(call, *prepare())

    gc.collect()
    gc.disable()
    try:
        # Nobody is cold in the first lap: who is timed has passed its check.
        laps = [list(lap())]
        rounds = min(max(int(SECONDS * len(by_name) / sum(laps[0])), LEAST), MOST)
        laps += [list(lap()) for _ in range(rounds - 1)]
    finally:
        gc.enable()
    return dict(zip(by_name, map(list, zip(*laps, strict=True)), strict=True))


_readings: Iterator[float] = iter(())


def recorded() -> float:
    """A timer for pytest-benchmark: successive pairs of readings are apart by what `replay` was given."""
    return next(_readings)


def replay(seconds: list[float]) -> None:
    """Wind `recorded` up."""
    global _readings
    _readings = iter([reading for duration in seconds for reading in (0.0, duration)])
