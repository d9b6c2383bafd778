"""The clock of a device, and the ceiling that its readings are held against.

On a GPU an Instant is a CUDA event: recorded when read, and waited for only when two are subtracted, after the region
that they enclose was queued. The host runs ahead during `cool_caches`, so its launches are not in the time unless they
take longer than that. On a CPU it is the host's own clock.
"""

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import results

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
COPY_BYTES = 2**31 if HAS_GPU else 2**28
# Twenty times the L2 cache of an H100, and half a millisecond for the host to run ahead in.
FLUSH_BYTES = 2**30
# Copies that are thrown away, half a second of them on an H100 that comes out of its sleep, and copies that are timed.
WARM_UP, COPIES = (300, 50) if HAS_GPU else (2, 12)
BROKEN = "has broken the GPU"


class LostDeviceError(Exception):
    """What a provider raised has left this process without its GPU: everything that follows would fail too."""

    def __init__(self, provider: str, error: Exception) -> None:
        words = str(error).strip().splitlines() or [""]
        super().__init__(f"{provider} {BROKEN}: {type(error).__name__}: {words[0][:160]}")
        self.provider = provider


def hold_on(provider: str, error: Exception) -> None:
    """After an exception of a provider: LostDeviceError where the device takes no work any more."""
    if HAS_GPU:
        try:
            torch.cuda.synchronize()
        except Exception:
            raise LostDeviceError(provider, error) from None


def age() -> float:
    """Seconds since this process was started: its imports alone take ten."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def deadline(seconds: float) -> float:
    """When a process has had these seconds, on the clock time.monotonic."""
    return time.monotonic() - age() + seconds


class Instant:
    """A point in a GPU's time; the difference of two is in seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Instant") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock() -> Any:
    """This moment, of the device."""
    return Instant() if HAS_GPU else time.perf_counter()


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)


def cool_caches() -> None:
    """Fill a GPU's cache with something else, so that inputs come from memory.

    A CPU's is left alone: the copy of the logits that precedes every round has passed through it.
    """
    if HAS_GPU:
        _flush_buffer().zero_()


def timed(run: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call."""
    start = clock()
    result = run(*arguments)
    seconds = clock() - start
    del result
    return seconds


def busy_elsewhere() -> float:
    """CPU seconds that other processes have used so far; 0 where only a GPU's time counts."""
    if HAS_GPU:
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy between two large buffers: the ceiling of this run, p20."""
    source = torch.ones(COPY_BYTES // 4, dtype=torch.float32, device=DEVICE)
    target = torch.zeros_like(source)
    # A device that was idle has lowered its clocks.
    for _ in range(WARM_UP):
        target.copy_(source)
    times = sorted(timed(target.copy_, source) for _ in range(COPIES))
    # As the cases that are held against it.
    return 2 * COPY_BYTES / results.percentile(times, 0.2)
