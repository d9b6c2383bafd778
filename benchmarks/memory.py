"""Peak memory above the inputs: what a provider needs besides its inputs, gradients included.

GPU    The peak of torch's allocator, in the process of the suite: the allocator counts exactly, whatever ran before.

CPU    The high-water mark of resident memory, in a fresh process for each case (forked from a server that has
       imported torch and this, and computed nothing). The inputs are made and touched, and the provider is run once,
       so that libraries, threads and compiled code are there. Then freed memory goes back to the system, Linux resets
       the mark, and forward and backward run again: peak = mark - resident size before. Nothing else is subtracted.
"""

import ctypes
import gc
import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.provider import Provider
from benchmarks.providers import BY_NAME
from benchmarks.shapes import Inputs, Shape, make_inputs


class Peak(NamedTuple):
    """Bytes above the inputs until the end of forward, and until the end of backward where there is one."""

    forward: int
    both: int

    def of(self, which: str) -> int:
        """Backward keeps what forward left, so its peak is that of both."""
        return self.forward if which == "forward" else self.both


def resident(mark: str) -> int:
    """VmRSS (now) or VmHWM (the mark) of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(mark + ":"))


def reset_mark() -> None:
    """Give freed memory back to the system, and begin VmHWM anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure_gpu(provider: Provider, inputs: Inputs) -> Peak:
    """By the allocator; the second call of a provider, which no longer compiles or tunes anything."""
    values = inputs.fresh()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.set_grad_enabled(inputs.has_gradient):
        result = provider.run(*values, *inputs.rest)
    forward = torch.cuda.max_memory_allocated() - before
    if inputs.has_gradient:
        torch.autograd.grad(result, values)
    return Peak(forward, torch.cuda.max_memory_allocated() - before)


def measure_here(provider: Provider, inputs: Inputs) -> Peak:
    """By the resident size of this process, which is to be a fresh one."""
    for measured in (False, True):
        values = inputs.fresh()
        if measured:
            reset_mark()
        before = resident("VmRSS")
        with torch.set_grad_enabled(inputs.has_gradient):
            result = provider.run(*values, *inputs.rest)
        forward = both = resident("VmHWM") - before
        gradients = None
        if inputs.has_gradient:
            gradients = torch.autograd.grad(result, values)
            both = resident("VmHWM") - before
        del values, result, gradients
    return Peak(forward, both)


def _case(shape: Shape, provider: str) -> Peak:
    return measure_here(BY_NAME[shape.path][provider], make_inputs(shape, torch.device("cpu")))


def measure_cpu(shape: Shape, provider: str) -> Peak:
    """`measure_here` in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "benchmarks.memory"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_case, shape, provider).result()


@cache
def _waiting() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2)


def begin_cpu(shape: Shape, provider: str) -> Future[Peak]:
    """`measure_cpu` in the background, two at a time: what a process needs does not depend on its neighbours."""
    return _waiting().submit(measure_cpu, shape, provider)
