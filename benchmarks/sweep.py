"""Which cut of a row is fastest on this GPU: every kernel, over tiles and over the programs that share a row.

    python -m benchmarks.sweep                       prints, and writes benchmarks/results/tiles/<device>.json
    python -m benchmarks.sweep forward               one kernel: slab, forward, backward
    python -m benchmarks.sweep --results FOLDER      writes FOLDER/tiles/<device>.json

kernels/tiles.py holds what was found, by hand, and cites the file. The launchers run as they are, with the functions
replaced that choose their tiles; times are p20 of rounds with a cold cache, in turns, as in the other benchmarks. The
shares are of a copy of the bytes that can't be left out: of the slab, each logit read once and written once. Its two
visits, "2x1024, 4x1024", have the same threads and strips of their own.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import results
from benchmarks.clock import DEVICE, HAS_GPU, cool_caches, copy_bandwidth, timed
from benchmarks.shapes import MODELS
from mtp_ce.kernels import backward, forward, forward_backward, tiles
from mtp_ce.kernels.results import RowResults, Rows
from mtp_ce.ops.chunks import new_logits
from mtp_ce.options import LossInputs, LossOptions

STRIPS, THREADS = (1, 2, 4, 8), (128, 256, 512, 1024)
PROGRAMS = (4, 8, 16, 32, 64)
ROUNDS, MOST_BYTES_IN_A_TILE = 12, 2**17


class Problem(NamedTuple):
    """Rows of logits: P positions of H heads. The slab has P * H rows."""

    P: int
    H: int
    V: int
    dtype: torch.dtype
    softcap: float | None = None

    @property
    def loss(self) -> LossOptions:
        """The options of a loss."""
        return LossOptions(weight_alignment="target", softcap=self.softcap)


Cut = tuple[tiles.Tile, ...]  # a tile for each of a launcher's choices


class Kernel(NamedTuple):
    """A launcher's choice, as the functions of kernels/tiles.py that its module has imported."""

    module: Any
    choices: tuple[str, ...]
    call: Callable[[Problem, torch.device], Callable[[], None]]
    passes: int  # over the bytes of all logits
    problems: tuple[Problem, ...]


def _tensors(problem: Problem, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    P, H, V, dtype, _ = problem
    logits = torch.randn(1, P, H, V, dtype=dtype, device=device).mul_(3)
    return logits, torch.randint(V, (1, P), device=device), torch.rand(1, P, device=device) + 0.1


def _forward(problem: Problem, device: torch.device) -> Callable[[], None]:
    logits, labels, weights = _tensors(problem, device)

    def call() -> None:
        inputs = LossInputs(labels, weights)
        forward.launch_forward([logits], inputs, problem.loss, with_top1=False, with_d_weights=False)

    return call


def _backward(problem: Problem, device: torch.device) -> Callable[[], None]:
    logits, labels, weights = _tensors(problem, device)
    d_logits, inputs = torch.empty_like(logits), LossInputs(labels, weights)
    found = forward.launch_forward([logits], inputs, problem.loss, with_top1=False, with_d_weights=False)
    factor = torch.ones((), device=device)

    def call() -> None:
        backward.launch_backward(
            torch.ones_like(found.out), [logits], [d_logits], inputs, problem.loss, found.row_max, found.log_sum, factor
        )

    return call


def _slab(problem: Problem, device: torch.device) -> Callable[[], None]:
    # Rows as far apart as the linear path has them.
    unembed = torch.empty(problem.V, 1, dtype=problem.dtype, device=device)
    slab = new_logits(unembed, problem.P * problem.H).normal_(0, 3)
    label = torch.randint(problem.V, (len(slab),), dtype=torch.int32, device=device)
    coefficient, ce, row_loss, lse = (torch.ones(len(slab), device=device) for _ in range(4))
    read = torch.ones(len(slab), dtype=torch.bool, device=device)

    def call() -> None:
        # Its own gradient is its next input: as wide a row as any, and no copy between the rounds.
        forward_backward.launch_forward_backward(
            slab, Rows(label, coefficient, read), RowResults(ce, row_loss, lse, None), problem.loss, gradient=True
        )

    return call


def _problems(P: int, H: int, *dtypes: torch.dtype) -> tuple[Problem, ...]:
    losses = sorted({(model.V, model.softcap) for model in MODELS.values()}, key=lambda loss: (loss[0], loss[1] or 0))
    return tuple(Problem(P, H, V, dtype, softcap) for dtype in dtypes for V, softcap in losses)


BOTH = (torch.bfloat16, torch.float32)
# First what a target is read from, in case that there is no time for the others.
KERNELS = {
    "slab": Kernel(
        forward_backward, ("chunk_tile", "backward_tile"), _slab, 2, _problems(4096, 1, torch.bfloat16)
    ),
    "forward": Kernel(forward, ("forward_tile",), _forward, 1, _problems(2048, 4, *BOTH)),
    "backward": Kernel(backward, ("backward_tile",), _backward, 2, _problems(2048, 4, *BOTH)),
}  # fmt: skip
FEW = tuple(Problem(P, H, 151936, torch.bfloat16) for P, H in ((256, 1), (64, 4), (600, 4), (2048, 4)))


@contextmanager
def chosen(kernel: Kernel, cut: Cut | None) -> Iterator[None]:
    """The launcher cuts rows into these tiles; as kernels/tiles.py says where they are None."""
    if cut is None:
        yield
        return
    choices = {name: lambda *_, tile=tile: tile for name, tile in zip(kernel.choices, cut, strict=True)}
    with mock.patch.multiple(kernel.module, **choices):
        yield


def candidates(itemsize: int, choices: int) -> Iterator[Cut]:
    """Tiles that registers can hold, of as many threads for each of a launcher's choices."""
    for threads in THREADS:
        fitting = [
            tiles.Tile(strips, threads, threads // tiles.WARP_SIZE)
            for strips in STRIPS
            if strips * threads * tiles.VECTOR_BYTES // itemsize * 4 <= MOST_BYTES_IN_A_TILE
        ]
        yield from product(fitting, repeat=choices)


def race(calls: dict[Any, Callable[[], None]]) -> dict[Any, float | str]:
    """P20 in seconds of every call, in turns; what it raised where it can't run."""
    outcome: dict[Any, float | str] = {}
    seconds: dict[Any, list[float]] = {}
    for name, call in calls.items():
        try:
            call()  # compiles
            seconds[name] = []
        except Exception as error:
            outcome[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    for _ in range(ROUNDS):
        for name, durations in seconds.items():
            cool_caches()
            durations.append(timed(calls[name]))
    return outcome | {name: results.percentile(sorted(durations), 0.2) for name, durations in seconds.items()}


def _entries(
    name: str, problem: Problem, found: dict[Any, float | str], label: str, bandwidth: float
) -> Iterator[dict[str, Any]]:
    P, H, V, dtype, softcap = problem
    ceiling = KERNELS[name].passes * P * H * V * dtype.itemsize / bandwidth
    fastest = min((seconds for seconds in found.values() if isinstance(seconds, float)), default=None)
    for choice, seconds in found.items():
        words = str(dtype).removeprefix("torch.")
        entry = {"kernel": name, "P": P, "H": H, "V": V, "dtype": words, "softcap": softcap, label: choice}
        if isinstance(seconds, str):
            yield {**entry, "failed": seconds}
        else:
            share = round(ceiling / seconds, 4)
            yield {**entry, "p20_ms": round(seconds * 1e3, 5), "of_copy": share, "fastest": seconds == fastest}


def sweep_tiles(name: str, problem: Problem, bandwidth: float, device: torch.device) -> list[dict[str, Any]]:
    """Every candidate on one problem, and what kernels/tiles.py says."""
    kernel = KERNELS[name]
    call = kernel.call(problem, device)

    def with_tiles(cut: Cut | None) -> Callable[[], None]:
        def run() -> None:
            with chosen(kernel, cut):
                call()

        return run

    calls = {"as is": with_tiles(None)}
    for cut in candidates(problem.dtype.itemsize, len(kernel.choices)):
        calls[", ".join(f"{tile.strips}x{tile.threads}" for tile in cut)] = with_tiles(cut)
    return [*_entries(name, problem, race(calls), "tile", bandwidth)]


def sweep_programs(name: str, problem: Problem, bandwidth: float, device: torch.device) -> list[dict[str, Any]]:
    """Few rows: over the programs to a multiprocessor from which on nobody shares a row."""
    call = KERNELS[name].call(problem, device)

    def with_programs(least: int) -> Callable[[], None]:
        def run() -> None:
            with mock.patch.object(tiles, "LEAST_PROGRAMS", least):
                call()

        return run

    calls = {least: with_programs(least) for least in (0, *PROGRAMS)}
    return [*_entries(name, problem, race(calls), "least_programs", bandwidth)]


def line(entry: dict[str, Any]) -> str:
    """An entry as text."""
    choice = entry.get("tile", entry.get("least_programs"))
    capped = " softcap" if entry["softcap"] else ""
    rows = f"P={entry['P']:<6}H={entry['H']} V={entry['V']:<7}{entry['dtype']:8}{capped:8}"
    problem = f"{entry['kernel']:9}{rows}{choice!s:>15}"
    if "failed" in entry:
        return f"{problem}  {entry['failed']}"
    return f"{problem} {entry['p20_ms']:9.3f} ms {entry['of_copy']:6.1%}{'  fastest' if entry['fastest'] else ''}"


def main(arguments: list[str]) -> int:
    """Sweep the kernels named, or all; 2 for a name that is none, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"{', '.join(KERNELS)}; all where none is named")
    parser.add_argument(
        "--results", type=Path, default=results.RESULTS, metavar="FOLDER",
        help="write FOLDER/tiles/<device>.json; FOLDER is benchmarks/results/ where none is named",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    names = options.kernels
    unknown = [name for name in names if name not in KERNELS]
    if unknown:
        print(f"sweep: no kernel {unknown[0]!r}; expected {', '.join(KERNELS)}.", file=sys.stderr)
        return 2
    if not HAS_GPU:
        print("sweep: no GPU that torch can use; nothing was run.", file=sys.stderr)
        return 3
    bandwidth = copy_bandwidth()
    path = results.results_path(DEVICE.type, options.results / "tiles")
    machine = results.new_run(DEVICE.type, bandwidth)
    run = {name: value for name, value in machine.items() if name not in ("cases", "absent", "steps")}
    entries: list[dict[str, Any]] = []
    for name in names or KERNELS:
        problems = [(sweep_tiles, problem) for problem in KERNELS[name].problems]
        if name != "slab":
            problems += [(sweep_programs, problem) for problem in FEW]
        for sweep, problem in problems:
            found = sweep(name, problem, bandwidth, DEVICE)
            print(*map(line, found), sep="\n", flush=True)
            entries += found
            results.write_json(path, {**run, "tiles": entries})
    print(f"written to {path.name}; a copy moves {bandwidth / 1e9:.0f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
