"""What was demanded of the speed, and what a results file shows of it: one line a target.

    python -m benchmarks.targets                    every file of benchmarks/results
    python -m benchmarks.targets FILE_OR_FOLDER     another file, or all of another folder

A target has parts, mostly shapes: it is met where every part reaches its bound, missed where one does not, and else not
measured. A part is a figure of one run, the newest that has all of it. The slab kernel's come from what the sweep wrote
beside the file, tiles/<device>.json. Exit code: 0 where there is a file, whatever it says; 2 where there is none.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import plan, results
from benchmarks.results import Run
from benchmarks.shapes import PROMPT, Shape
from benchmarks.table import largest, timed_steps

GIB, MIB = 2**30, 2**20
LISTED = 5  # parts that a line names
LONGEST_REASON = 50


class File(NamedTuple):
    """A device's results, and what the sweep found on it."""

    runs: list[Run]
    tiles: dict[str, Any]  # empty where nothing was swept

    @property
    def newest(self) -> dict[str, Any]:
        """What names the device."""
        return self.runs[-1] if self.runs else self.tiles


class Part(NamedTuple):
    """One figure of a target; None where it was not measured, with the reason if one is known."""

    label: str
    value: float | None
    note: str = ""


class Target(NamedTuple):
    """A demand: every part `holds` against the bound. Without a bound it is only shown."""

    point: str
    demand: str
    read: Callable[[File], Iterable[Part]]
    form: str
    holds: Callable[[float, float], bool] = ge
    bound: float | None = None


def newest(file: File, read: Callable[[Run], float | None]) -> float | None:
    """What the newest run says that says anything."""
    return next((value for run in reversed(file.runs) if (value := read(run)) is not None), None)


def case(run: Run, provider: str, which: str, shape: Shape) -> dict[str, Any] | None:
    """A case of a run."""
    wanted = provider, which, shape.as_dict()
    return next((case for case in run["cases"] if (case["provider"], case["pass"], case["shape"]) == wanted), None)


def reason(file: File, providers: Sequence[str], which: str, shape: Shape) -> str:
    """Why one of them is absent, by the newest run that says so."""
    wanted = shape.as_dict()
    for run in reversed(file.runs):
        for entry in run["absent"]:
            if entry["provider"] in providers and (entry["pass"], entry["shape"]) == (which, wanted):
                return str(entry["reason"])[:LONGEST_REASON]
    return ""


def name(shape: Shape) -> str:
    """A shape in a word or two: what it does not share with most of the others."""
    width = f" D{shape.D}" if shape.D else ""
    heads = "" if shape.H == 4 else f" H{shape.H}"
    rows = "" if shape.rows == 8192 else f" N{shape.rows}"
    return f"V{shape.V}{width}{heads}{rows}{' prompt' if shape.prompt else ''}"


def of_case(
    which: str, shapes: Sequence[Shape], value: Callable[[dict[str, Any]], float | None]
) -> Callable[[File], Iterator[Part]]:
    """A figure of our case at every shape."""

    def read(file: File) -> Iterator[Part]:
        for shape in shapes:

            def figure(run: Run, shape: Shape = shape) -> float | None:
                found = case(run, "mtp_ce", which, shape)
                return None if found is None else value(found)

            yield Part(name(shape), newest(file, figure), reason(file, ["mtp_ce"], which, shape))

    return read


def share(which: str, shapes: Sequence[Shape]) -> Callable[[File], Iterator[Part]]:
    """Share of the ceiling."""
    return of_case(which, shapes, lambda found: found["share_of_ceiling"])


def both_passes(shapes: Sequence[Shape]) -> Callable[[File], Iterator[Part]]:
    """Share of the ceiling of forward and of backward."""

    def read(file: File) -> Iterator[Part]:
        for which in ("forward", "backward"):
            for part in share(which, shapes)(file):
                yield part._replace(label=f"{part.label} {which}")

    return read


def over_products(found: dict[str, Any]) -> float | None:
    """Our time over that of the bare products in the same run."""
    return found["p20_ms"] / found["ceiling_ms"] if found["ceiling_ms"] else None


def above_gradients(found: dict[str, Any]) -> float:
    """Peak memory above inputs and gradients, GiB."""
    return (found["peak_bytes"] - found["shape"]["gradient_bytes"]) / GIB


def ahead(peers: Sequence[str], shapes: Sequence[Shape]) -> Callable[[File], Iterator[Part]]:
    """The fastest of these over ours, of the same run, at every shape."""

    def read(file: File) -> Iterator[Part]:
        for shape in shapes:

            def figure(run: Run, shape: Shape = shape) -> float | None:
                ours = case(run, "mtp_ce", "both", shape)
                theirs = [found["p20_ms"] for peer in peers if (found := case(run, peer, "both", shape))]
                return min(theirs) / ours["p20_ms"] if ours and theirs else None

            yield Part(name(shape), newest(file, figure), reason(file, ["mtp_ce", *peers], "both", shape))

    return read


def against(
    ours: tuple[str, Shape], other: tuple[str, Shape], passes: Sequence[str]
) -> Callable[[File], Iterator[Part]]:
    """The time of one (provider, shape) over that of another, of the same run."""

    def read(file: File) -> Iterator[Part]:
        for which in passes:

            def figure(run: Run, which: str = which) -> float | None:
                above, below = (case(run, provider, which, shape) for provider, shape in (ours, other))
                return above["p20_ms"] / below["p20_ms"] if above and below else None

            why = reason(file, [ours[0]], which, ours[1]) or reason(file, [other[0]], which, other[1])
            yield Part(which, newest(file, figure), why)

    return read


def slab(vocabularies: Sequence[int]) -> Callable[[File], Iterator[Part]]:
    """The slab kernel, in the tile that the project chose, over one read and one write of its logits."""

    def read(file: File) -> Iterator[Part]:
        for V in vocabularies:
            found = [
                entry
                for entry in file.tiles.get("tiles", ())
                if (entry["kernel"], entry["V"], entry.get("tile"), entry["softcap"]) == ("slab", V, "as is", None)
            ]
            of_copy = found[0].get("of_copy") if found else None
            why = "python -m benchmarks.sweep" if not found else found[0].get("failed", "")
            yield Part(f"V{V}", 1 / of_copy if of_copy else None, why[:LONGEST_REASON])

    return read


def ce_share(shapes: Sequence[Shape]) -> Callable[[File], Iterator[Part]]:
    """What the cross-entropy kernel takes of a linear call."""

    def read(file: File) -> Iterator[Part]:
        for shape in shapes:
            yield Part(name(shape), newest(file, lambda run, key=str(shape): run.get("ce_share", {}).get(key)))

    return read


def host_time(file: File) -> Iterator[Part]:
    """Microseconds of the calls that were timed, each of the newest run that has it."""
    host = {call: value for run in file.runs for call, value in run.get("host_us", {}).items()}
    yield from (Part(call, microseconds) for call, microseconds in host.items())
    if not host:
        yield Part("benchmarks/test_host_time.py", None)


def steps(file: File) -> Iterator[Part]:
    """Tokens a second of the newest training steps, and the rest in words."""
    entries = next((entries for run in reversed(file.runs) if (entries := timed_steps(run))), [])
    for entry in entries:
        part = entry["share_in_loss"]
        in_loss = "" if part is None else f", {part:.0%} in the loss"
        peak = f"{entry['peak_bytes'] / GIB:.1f} GiB"
        yield Part(entry["provider"], entry["tokens_per_s"], f" ({peak}{in_loss}, largest {largest(entry)} rows)")
    if not entries:
        yield Part("benchmarks/training_step.py", None)


def logits(model: str, S: int = 2048, H: int = 4, kind: str = "cuda", dtype: str = "bf16") -> Shape:
    """A shape of the logits path."""
    return plan.shape_of(kind, "logits", model, S, H, dtype)


def linear(model: str, S: int = 2048, **more: float) -> Shape:
    """A shape of the linear path, four heads."""
    return plan.shape_of("cuda", "linear", model, S, 4, "bf16", **more)


LOGITS = tuple(dict.fromkeys(case.shape for case in plan.cases("cuda", "logits")))
VOCABULARIES = (
    "Llama-2 7B", "GPT-2", "GPT-2, padded", "Llama-3 8B", "Qwen3 8B", "Qwen2.5 7B", "Gemma-2 2B", "Gemma-3 4B",
)  # fmt: skip
FULL = tuple(
    dict.fromkeys((*map(logits, VOCABULARIES), *(shape for shape in LOGITS if shape.rows == 8192 and not shape.prompt)))
)
FEW = (logits("Qwen3 8B", 256, 1), logits("Qwen3 8B", 64, 4))
LINEAR = (
    linear("Qwen3 8B"), linear("Llama-3 8B"), linear("Qwen3 1.7B", 8192), linear("Gemma-2 2B"), linear("Llama-2 7B"),
)  # fmt: skip
DEAD = linear("Qwen3 8B", prompt=PROMPT)
ODD, EVEN = (logits(model) for model in ("GPT-2", "GPT-2, padded"))

SHARE, TIMES = "{:.0%}", "{:.2f}x"
GPU_TARGETS = (
    Target("2", "forward >= 90% of a copy, V >= 32000, N 8192", share("forward", FULL), SHARE, ge, 0.90),
    Target("2", "backward >= 90% of a copy, V >= 32000, N 8192", share("backward", FULL), SHARE, ge, 0.90),
    Target(
        "2", "V 50257 within 10% of V 50304",
        against(("mtp_ce", ODD), ("mtp_ce", EVEN), ("forward", "backward", "both")), TIMES, le, 1.10,
    ),
    Target("2", "256 rows, V 151936 >= 70% of a copy", both_passes(FEW), SHARE, ge, 0.70),
    Target("2", "slab kernel, V <= 65536 <= 1.15x a read and a write", slab((32000, 50257, 50304)), TIMES, le, 1.15),
    Target("2", "slab kernel above that, no bound", slab((128256, 151936, 152064, 262144)), TIMES),
    Target("2", "ahead of Liger per head, every logits shape", ahead(["liger_heads"], LOGITS), TIMES, gt, 1.0),
    Target("2", ">= 2x the compiled loop, every logits shape", ahead(["compiled_loop"], LOGITS), TIMES, ge, 2.0),
    Target("2", ">= 6x the eager loop, every logits shape", ahead(["eager_loop"], LOGITS), TIMES, ge, 6.0),
    Target("3", "linear <= 1.10x the bare products, 5 shapes", of_case("both", LINEAR, over_products), TIMES, le, 1.10),
    Target(
        "3", "linear < 4 GiB above inputs and gradients, 5 shapes",
        of_case("both", LINEAR, above_gradients), "{:.2f} GiB", lt, 4.0,
    ),
    Target("3", "linear ahead of Liger, 5 shapes", ahead(["liger", "liger_4096"], LINEAR), TIMES, gt, 1.0),
    Target("3", "linear ahead of cut-cross-entropy, 5 shapes", ahead(["cce", "cce_exact"], LINEAR), TIMES, gt, 1.0),
    Target("3", "linear ahead of the compiled loop, 5 shapes", ahead(["compiled_loop"], LINEAR), TIMES, gt, 1.0),
    Target(
        "3", "40% dead, dropped by their number <= 0.65x the full shape",
        against(("mtp_ce_dropped", DEAD), ("mtp_ce", LINEAR[0]), ["both"]), TIMES, le, 0.65,
    ),
    Target("3", "the CE kernel <= 8% of a linear call, 5 shapes", ce_share(LINEAR), "{:.1%}", le, 0.08),
    Target(
        "4", "no synchronisation, CUDA graph, compiled = eager",
        lambda file: [Part("a figure, by tests/mtp_ce/test_gpu.py and tests/mtp_ce/test_compile.py", None)], "",
    ),
    Target("4", "host time of a tiny call <= 100 us", host_time, "{:.0f}", le, 100.0),
    Target("5", "training step, tokens/s", steps, "{:,.0f}"),
)  # fmt: skip

CPU_SHAPES = {dtype: logits("Llama-2 7B", 512, 4, "cpu", dtype) for dtype in ("fp32", "bf16")}


def on_cpu(value: Callable[[Run, str, Shape], float | None]) -> Callable[[File], Iterator[Part]]:
    """A figure of both dtypes, beside the logits and in their place."""

    def read(file: File) -> Iterator[Part]:
        for dtype, shape in CPU_SHAPES.items():
            for provider, place in (("mtp_ce", ""), ("mtp_ce_inplace", " in place")):

                def figure(run: Run, provider: str = provider, shape: Shape = shape) -> float | None:
                    return value(run, provider, shape)

                yield Part(f"{dtype}{place}", newest(file, figure), reason(file, [provider], "both", shape))

    return read


def times_faster_than(peer: str) -> Callable[[Run, str, Shape], float | None]:
    """The peer's time over that of one of ours."""

    def value(run: Run, provider: str, shape: Shape) -> float | None:
        ours, theirs = (case(run, of, "both", shape) for of in (provider, peer))
        return theirs["p20_ms"] / ours["p20_ms"] if ours and theirs else None

    return value


def beyond_gradient(run: Run, provider: str, shape: Shape) -> float | None:
    """MiB beside the gradient; in place, where it has no room of its own, all of them."""
    found = case(run, provider, "both", shape)
    held = 0 if provider == "mtp_ce_inplace" else shape.gradient_bytes
    return (found["peak_bytes"] - held) / MIB if found else None


CPU_TARGETS = (
    Target("cpu", "2048 rows, V 32000 >= 10x the eager loop", on_cpu(times_faster_than("eager_loop")), TIMES, ge, 10),
    Target("cpu", "2048 rows, V 32000 >= 2x the compiled", on_cpu(times_faster_than("compiled_loop")), TIMES, ge, 2),
    Target("cpu", "<= 64 MiB beside the gradient, in place in all", on_cpu(beyond_gradient), "{:.0f} MiB", le, 64),
)  # fmt: skip
TARGETS = {"cpu": CPU_TARGETS, "cuda": GPU_TARGETS}


def listed(words: list[str]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(words) - LISTED} more" if len(words) > LISTED else ""
    return ", ".join(words[:LISTED]) + more


def line(target: Target, file: File) -> str:
    """What is demanded, whether it is reached, the figures; and what is missing, with the first reason known."""
    parts = [*target.read(file)]
    found = [(part, part.value) for part in parts if part.value is not None]
    absent = [part for part in parts if part.value is None]
    said = []

    def shown(part: Part, value: float) -> str:
        return f"{part.label} {target.form.format(value)}{part.note if target.bound is None else ''}"

    if target.bound is None:
        verdict = "shown" if found else "not measured"
        said += ["; ".join(shown(*one) for one in found)] if found else []
    else:
        bound = target.bound
        worst_first = sorted(found, key=lambda one: one[1], reverse=target.holds in (le, lt))
        missed = [one for one in worst_first if not target.holds(one[1], bound)]
        good = worst_first[len(missed) :]
        verdict = "MISSED" if missed else "not measured" if absent or not found else "met"
        if missed:
            said.append(listed([shown(*one) for one in missed]))
        if good:
            said.append(f"{len(good)} of {len(parts)} good, the worst {shown(*good[0])}")
    if absent:
        why = next((part.note for part in absent if part.note), "")
        said.append(f"without {listed([part.label for part in absent])}{f' ({why})' if why else ''}")
    return f"{target.point:>3} {verdict:12} {target.demand}: {'; '.join(said)}"


def lines(file: File) -> Iterator[str]:
    """The device, then a line a target."""
    device = file.newest
    yield f"{device['device']}, measured {device['measured']}, commit {(device['commit'] or 'unknown')[:12]}"
    stale = dict.fromkeys(part for run in file.runs for part in results.stale_parts(run))
    if file.tiles and results.is_stale(file.tiles, "logits"):
        stale["the sweep"] = None
    if stale:
        yield f"STALE: sources have changed since they were timed: {', '.join(stale)}"
    for target in TARGETS[device["kind"]]:
        yield line(target, file)


def read(path: Path) -> File:
    """A results file, with the sweep's beside it."""
    tiles = path.parent / "tiles" / path.name
    return File(results.read(path), json.loads(tiles.read_text()) if tiles.exists() else {})


def main(arguments: list[str]) -> int:
    """Print the targets of a file, or of every file of a folder."""
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        print(f"targets: {len(arguments)} arguments; expected one results file or folder, or none.", file=sys.stderr)
        return 2
    path = Path(arguments[0]) if arguments else results.RESULTS
    paths = sorted({path / file.name for file in (*path.glob("*.json"), *path.glob("tiles/*.json"))}) or [path]
    try:
        files = [file for file in map(read, paths) if file.newest]
    except (OSError, ValueError) as error:
        print(f"targets: {path} can't be read: {error}.", file=sys.stderr)
        return 2
    if not files:
        print(
            f"targets: no results in {path}; expected a file that the benchmarks wrote, or a folder.", file=sys.stderr
        )
        return 2
    for file in files:
        print(*lines(file), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
