"""Predicted times of the kernels on a GPU, from their machine code alone: nothing here is measured.

    python -m benchmarks.predict [sm_80 | sm_90 | sm_100]    print the table
    python -m benchmarks.predict --write                     write those of sm_90 and sm_100 to benchmarks/LOG.md

The launchers compile for the target on any machine (compiled.py); grid, tile and constants are those of the launch, and
instructions, registers and shared memory those of the cubin (sass.py). A program's time on an SM is then the largest of

    bytes   what all programs of a wave move, over the copy bandwidth of the device
    issue   its warps' instructions, one a clock on each of an SM's four schedulers
    mufu    its exponentials and logarithms, 16 lanes a clock on an SM
    alu     comparisons, maxima, logic and conversions, 64 lanes a clock on an SM
    wait    passes, one after the other, each a memory latency and one warp's own work, or the longer of the two where
            the next pass's logits are loaded ahead

the middle three times the blocks that share the SM. A wave is what fits on the device at once; the last may be smaller,
and then its SMs hold fewer blocks. That is the best case: one warp's waiting is another's work. In the worst, the warps
of an SM wait and work in step, and the last wave takes as long as a full one. Bytes are those of `traffic` in the
kernels' files, and the ceiling is those that must move, over the copy bandwidth.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from math import ceil
from operator import add
from typing import NamedTuple

import torch
import triton

from benchmarks import report, results, sass
from benchmarks.compiled import PLAIN, Launch, compiling, launch_chunk, launch_logits
from mtp_ce.kernels import backward, forward, forward_backward
from mtp_ce.kernels.tiles import FIRST_LOADS

WRITTEN = ("sm_90", "sm_100")
LOG = results.ROOT / "benchmarks" / "LOG.md"
VOCABULARIES = (32000, 50257, 50304, 128256, 151936, 262144)
DTYPE = torch.bfloat16
BOUNDS = ("bytes", "issue", "mufu", "alu", "wait")
# Of an SM since sm_80: lanes of a warp, instructions a clock, results a clock.
WARP = 32
SCHEDULERS = 4
MUFU_LANES = 16
ALU_LANES = 64


class Gpu(NamedTuple):
    """A device by its data sheet; what is called an estimate is to be replaced once it is measured."""

    name: str
    sms: int
    clock: float  # 1/s; an estimate
    copy_bytes_per_s: float  # read and written; an estimate: 0.85 to 0.9 of the peak
    latency: float  # clocks from a load of a busy device to its value; an estimate: about twice that of an idle one
    l2_bytes: int
    shared_bytes: int  # of an SM
    threads: int = 2048  # of an SM, like the two below
    registers: int = 65536
    blocks: int = 32


GPUS = {
    "sm_80": Gpu("A100 80GB", 108, 1.41e9, 1.75e12, 1000, 40 * 10**6, 164 * 1024),
    "sm_90": Gpu("H100 SXM", 132, 1.755e9, 3.0e12, 1000, 50 * 10**6, 228 * 1024),
    "sm_100": Gpu("B200", 148, 1.85e9, 7.0e12, 1000, 126 * 10**6, 228 * 1024),
}


class Problem(NamedTuple):
    """Rows of logits [1, S, H, V], or a chunk of R = S rows."""

    S: int
    H: int
    V: int
    chunk: bool = False
    statistics: bool = False  # top1 too
    softcap: float | None = None

    @property
    def variant(self) -> str:
        """What is computed beside the plain loss."""
        named = {"statistics": self.statistics, f"softcap {self.softcap or 0:g}": self.softcap is not None}
        return "".join(f", {name}" for name, wanted in named.items() if wanted)

    @property
    def rows(self) -> int:
        """N, the number of rows."""
        return self.S * self.H

    @property
    def live(self) -> int:
        """Rows with a target: head h has none at the last 1 + h positions; in a chunk all rows have one."""
        return self.rows if self.chunk else sum(max(0, self.S - 1 - h) for h in range(self.H))


PROBLEMS = [
    *(Problem(2048, 4, V) for V in VOCABULARIES),
    *(Problem(4096, 1, V, chunk=True) for V in VOCABULARIES),
    Problem(256, 1, 151936),
    Problem(64, 4, 151936),
    Problem(256, 1, 151936, chunk=True),
    *(Problem(2048, 4, V, statistics=True) for V in (32000, 151936)),
    Problem(4096, 1, 151936, chunk=True, statistics=True),
    # Gemma 2 has this vocabulary and this softcap, but for a few entries.
    *(Problem(2048, 4, 262144, softcap=30.0, statistics=statistics) for statistics in (False, True)),
    Problem(4096, 1, 262144, chunk=True, softcap=30.0),
    # A few more positions than a device holds programs of backward.
    *(Problem(1100, H, 151936) for H in (1, 4)),
]


def blocks_per_sm(gpu: Gpu, registers: int, threads: int, shared: int) -> int:
    """Return the blocks that fit on an SM at once."""
    warps = ceil(threads / WARP)
    # Registers are allocated to a warp 256 at a time, and a quarter of them serves the warps of one scheduler.
    of_a_warp = ceil(max(registers, 1) * WARP / 256) * 256
    by_registers = gpu.registers // SCHEDULERS // of_a_warp * SCHEDULERS // warps
    # The driver keeps 1 KB of every block's shared memory for itself; resource usage counts it where there is any.
    by_shared = gpu.shared_bytes // (ceil(max(shared, 1024) / 128) * 128)
    return min(gpu.blocks, gpu.threads // (warps * WARP), by_registers, by_shared)


class Prediction(NamedTuple):
    """One kernel on one problem."""

    launch: Launch
    problem: Problem
    gpu: Gpu
    used: dict[str, int]  # registers, stack, spills, shared
    row_loops: list[sass.Loop]  # the loops over a valid row
    ceiling_bytes: int  # what must move
    bytes: int  # what this case moves
    case: str = ""

    @property
    def blocks(self) -> int:
        """Blocks on an SM."""
        return blocks_per_sm(self.gpu, self.used["registers"], self.launch.threads, self.used["shared"])

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.launch.threads // WARP

    @property
    def slots(self) -> int:
        """Blocks on the device."""
        return self.blocks * self.gpu.sms

    def per_element(self, pipe: str = "") -> float:
        """Return the issue slots of an element over all passes of a row; of one pipe where it is named."""
        return sum(
            (loop.count(pipe) if pipe else len(loop.instructions)) / loop.elements_per_thread(DTYPE.itemsize)
            for loop in self.row_loops
        )

    def passes(self, loop: sass.Loop) -> float:
        """Return the iterations of a loop in a program; the last tile of a row costs as much as a full one."""
        splits = self.launch.splits
        tile = loop.elements_per_thread(DTYPE.itemsize) * self.launch.threads
        return ceil(self.problem.V / splits / tile) * self.problem.rows * splits / self.launch.programs

    def in_flight(self) -> int:
        """Return the bytes of logits in flight on an SM when all of its programs wait."""
        return max(loop.bytes_per_thread() for loop in self.row_loops) * self.launch.threads * self.blocks

    def seconds(self, blocks: int, programs: int) -> dict[str, float]:
        """Return the time of one wave with `blocks` on the fullest SM, by what binds it; and "in step"."""
        first = FIRST_LOADS * self.gpu.latency
        clocks = {"issue": 0.0, "mufu": 0.0, "alu": 0.0, "wait": first, "in step": first}
        for loop in self.row_loops:
            passes = self.passes(loop)
            of_a_warp = {
                "issue": float(len(loop.instructions)),
                "mufu": loop.count("mufu") * WARP * SCHEDULERS / MUFU_LANES,
                "alu": loop.count("alu") * WARP * SCHEDULERS / ALU_LANES,
            }
            sharing = blocks * self.warps / SCHEDULERS
            for name, busy in of_a_warp.items():
                clocks[name] += passes * busy * sharing
            join = max if loop.loads_ahead() else add
            clocks["wait"] += passes * join(self.gpu.latency, max(of_a_warp.values()))
            clocks["in step"] += passes * join(self.gpu.latency, max(of_a_warp.values()) * sharing)
        moved = self.bytes * programs / self.launch.programs / self.gpu.copy_bytes_per_s
        return {"bytes": moved} | {name: clock / self.gpu.clock for name, clock in clocks.items()}

    def waves(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield the number of waves and their times: full waves, then the rest."""
        full, rest = divmod(self.launch.programs, self.slots)
        if full:
            yield full, self.seconds(self.blocks, self.slots)
        if rest:
            yield 1, self.seconds(ceil(rest / self.gpu.sms), rest)

    def bounds(self) -> dict[str, float]:
        """Return the seconds of all waves by what binds them."""
        total = dict.fromkeys(BOUNDS, 0.0)
        for times, wave in self.waves():
            for name in BOUNDS:
                total[name] += times * wave[name]
        return total

    def best(self) -> float:
        """Return the seconds where one warp's work hides another's latency."""
        return sum(times * max(wave[name] for name in BOUNDS) for times, wave in self.waves())

    def worst(self) -> float:
        """Return the seconds where warps run in step, and the last wave takes as long as a full one."""
        waves = list(self.waves())
        return sum(times for times, _ in waves) * max(waves[0][1].values())

    def share(self, seconds: float) -> float:
        """Return the share of the ceiling."""
        return self.ceiling_bytes / self.gpu.copy_bytes_per_s / seconds

    def binds(self) -> str:
        """Return what binds most of the best case."""
        total = dict.fromkeys(BOUNDS, 0.0)
        for times, wave in self.waves():
            name = max(BOUNDS, key=lambda bound: wave[bound])
            total[name] += times * wave[name]
        return max(BOUNDS, key=lambda bound: total[bound])


def row_loops(loops: list[sass.Loop], itemsize: int) -> list[sass.Loop]:
    """Return the loops of a valid row: of those that read, and of those that read and write, the cheapest an element.

    A head's loop stands once for every head, and a loop without masks may stand beside one with masks.
    """
    kinds: dict[bool, list[sass.Loop]] = {}
    for loop in loops:
        if loop.wide("LDG"):
            kinds.setdefault(bool(loop.wide("STG")), []).append(loop)
    return [
        min(alike, key=lambda loop: len(loop.instructions) / loop.elements_per_thread(itemsize))
        for _, alike in sorted(kinds.items())
    ]


def cases(name: str, problem: Problem) -> list[tuple[str, int, int]]:
    """Return where a second pass reads from, bytes that must move and bytes that do; nothing for helper kernels."""
    live, rows, H, V, size = problem.live, problem.rows, problem.H, problem.V, DTYPE.itemsize
    if name == "forward_kernel":
        moved = sum(forward.traffic(live, problem.S, H, V, size))
        return [("", moved, moved)]
    if name == "backward_kernel":
        moved = sum(backward.traffic(live, rows, V, size))
        return [("", moved, moved)]
    if name != "forward_backward_kernel":
        return []
    asked, written = forward_backward.traffic(live, rows, V, size, True)
    once = live * V * size
    if asked == once:
        return [("one pass", once + written, once + written)]
    return [("again from L2", once + written, once + written), ("again from memory", once + written, asked + written)]


def predictions(target: str, problems: list[Problem]) -> Iterator[Prediction]:
    """Yield a prediction for every kernel with a loop over the vocabulary, on every problem."""
    for problem in problems:
        with compiling(target, GPUS[target].sms) as launched:
            loss = {**PLAIN, "softcap": problem.softcap}
            if problem.chunk:
                launch_chunk(problem.S, problem.V, DTYPE, loss, extra=problem.statistics)
            else:
                logits = torch.empty(1, problem.S, problem.H, problem.V, dtype=DTYPE)
                launch_logits(logits, loss, extra=problem.statistics)
        for launch in launched:
            for case, least, moved in cases(launch.name, problem):
                used = sass.resources(launch.kernel)
                through = row_loops(sass.loops(sass.disassemble(launch.kernel)), DTYPE.itemsize)
                yield Prediction(launch, problem, GPUS[target], used, through, least, moved, case)


HEAD = (
    "kernel", "V", "N = S x H", "programs x threads", "registers, shared", "blocks an SM, occupancy", "waves",
    "instructions, MUFU, ALU an element", "KB in flight an SM", "GB", *(f"{name}, ms" for name in BOUNDS),
    "expected, ms", "of the ceiling", "bound by",
)  # fmt: skip


def table_row(one: Prediction) -> tuple[str, ...]:
    """Return the cells of a line."""
    problem, launch, gpu = one.problem, one.launch, one.gpu
    return (
        launch.name.removesuffix("_kernel") + problem.variant + (f", {one.case}" if one.case else ""),
        str(problem.V),
        str(problem.rows) if problem.chunk else f"{problem.S} x {problem.H}",
        f"{launch.programs} x {launch.threads}",
        f"{one.used['registers']}, {one.used['shared']}",
        f"{one.blocks}, {one.blocks * launch.threads / gpu.threads:.0%}",
        f"{launch.programs / one.slots:.2f}",
        f"{one.per_element():.2f}, {one.per_element('mufu'):.2f}, {one.per_element('alu'):.2f}",
        f"{one.in_flight() / 1024:.0f}",
        f"{one.bytes / 1e9:.3f}",
        *(f"{seconds * 1e3:.3f}" for seconds in one.bounds().values()),
        f"{one.best() * 1e3:.3f} to {one.worst() * 1e3:.3f}",
        f"{one.share(one.worst()):.0%} to {one.share(one.best()):.0%}",
        one.binds(),
    )


def launch_microseconds(target: str, calls: int = 200) -> float:
    """Return the host time of forward, mean and backward, as measured here: the least of `calls`, without a driver."""
    logits = torch.empty(1, 4, 4, 512, dtype=DTYPE)
    least = float("inf")
    with compiling(target, GPUS[target].sms):
        for _ in range(calls):
            begun = time.perf_counter()
            launch_logits(logits)
            least = min(least, time.perf_counter() - begun)
    return least * 1e6


def section(target: str) -> Iterator[str]:
    """Yield the lines of the table."""
    gpu = GPUS[target]
    yield f"Kernels `{results.source_hash('cuda', 'kernels')[:16]}`, triton {triton.__version__}, {target}."
    yield ""
    yield (
        f"Everything in this table is predicted; nothing is measured. {gpu.name}: {gpu.sms} SMs at "
        f"{gpu.clock / 1e9:g} GHz, a copy at {gpu.copy_bytes_per_s / 1e12:g} TB/s, {gpu.latency:g} clocks of latency."
    )
    yield ""
    yield (
        f"Host time, measured where this was written: {launch_microseconds(target):.0f} us for the launchers of "
        "forward, mean and backward, with their allocations and Triton's own work, without the driver's."
    )
    yield ""
    yield from report.table(HEAD, map(table_row, predictions(target, PROBLEMS)))


def main(arguments: list[str]) -> None:
    """Print the table of a target, or write those of `WRITTEN` to the log's sections of this Triton."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=main.__doc__)
    parser.add_argument("target", nargs="?", choices=GPUS, default="sm_90")
    parser.add_argument("--write", action="store_true", help=f"write {', '.join(WRITTEN)} to {LOG.name}")
    options = parser.parse_args(arguments)
    if options.write:
        for target in WRITTEN:
            table = "\n".join([*section(target), ""])
            page = report.replaced(LOG.read_text(encoding="utf-8"), f"triton-{triton.__version__}-{target}", table)
            LOG.write_text(page, encoding="utf-8")
    else:
        print(*section(options.target), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
