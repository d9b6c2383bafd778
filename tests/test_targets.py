"""What the targets read from a results file; and what is measured for them alone."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mtp_ce import weighted_mtp_linear_ce

ROOT = Path(__file__).resolve().parents[1]
Load = Callable[[str], ModuleType]
FAST, SLOW = 1.0, 100.0


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A module of benchmarks/, which is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def a_case(shape: Any, which: str, provider: str, ms: float, share: float = 0.95, extra: int = 0) -> dict[str, Any]:
    """As session.py records it; `extra` bytes above the gradients."""
    return {
        "provider": provider, "pass": which, "shape": shape.as_dict(), "p20_ms": ms, "ceiling_ms": ms * share,
        "share_of_ceiling": share, "peak_bytes": shape.gradient_bytes + extra,
    }  # fmt: skip


def a_run(kind: str, cases: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "device": "a device", "kind": kind, "measured": "2026-01-01T00:00+00:00", "commit": "0123456789abcdef",
        "source_hash": dict.fromkeys(("linear", "logits", "token_ce", "step"), "0" * 64), "versions": {},
        "copy_bytes_per_s": 3e12, "cases": cases, "absent": [], "steps": [], **more,
    }  # fmt: skip


def everything(targets: ModuleType) -> list[dict[str, Any]]:
    """Cases of a GPU by which every target is met; a peer takes 100 times our time."""
    cases = []
    for shape in dict.fromkeys((*targets.LOGITS, *targets.FULL, *targets.FEW)):
        cases += [a_case(shape, which, "mtp_ce", FAST) for which in ("forward", "backward", "both")]
        cases += [a_case(shape, "both", peer, SLOW) for peer in ("liger_heads", "compiled_loop", "eager_loop")]
    for shape in targets.LINEAR:
        cases.append(a_case(shape, "both", "mtp_ce", FAST, extra=2**30))
        cases += [a_case(shape, "both", peer, SLOW) for peer in ("liger", "liger_4096", "cce", "compiled_loop")]
    return [*cases, a_case(targets.DEAD, "both", "mtp_ce_dropped", 0.6 * FAST)]


TILES = [
    *(
        {"kernel": "slab", "V": V, "tile": "as is", "softcap": None, "of_copy": 0.9}
        for V in (32000, 50257, 50304, 128256, 151936, 152064, 262144)
    ),
    *({"kernel": "slab", "V": V, "tile": "1x128, 1x128", "softcap": None, "of_copy": 0.1} for V in (32000, 151936)),
    {"kernel": "forward", "V": 151936, "least_programs": 8, "softcap": None, "of_copy": 0.1},
]
STEPS = [
    {
        "provider": "linear", "tokens_per_s": 12345.0, "share_in_loss": 0.25, "peak_bytes": 2**34, "others_cpu": 0.0,
        "largest": {"rows": 8, "limit": "out of memory"},
    }
]  # fmt: skip


def verdicts(targets: ModuleType, runs: list[dict[str, Any]], tiles: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(verdict, line) of every target."""
    swept = {**a_run("cuda", []), "tiles": tiles} if tiles else {}
    lines = [*targets.lines(targets.File(runs, swept))]
    assert lines[0] == "a device, measured 2026-01-01T00:00+00:00, commit 0123456789ab"
    return [(line[4:16].strip(), line) for line in lines if not line.startswith(("a device", "STALE"))]


def a_full_run(targets: ModuleType, cases: list[dict[str, Any]]) -> dict[str, Any]:
    share = {str(shape): 0.05 for shape in targets.LINEAR}
    return a_run("cuda", cases, ce_share=share, host_us={"logits forward eager": 60.0}, steps=STEPS)


def test_a_file_in_which_everything_is_reached_has_every_target_met(load: Load) -> None:
    """But for what is only shown, and what tests alone hold."""
    targets = load("targets")
    found = verdicts(targets, [a_full_run(targets, everything(targets))], TILES)
    assert len(found) == len(targets.GPU_TARGETS)
    assert {line for verdict, line in found if verdict == "not measured"} == {
        line for _, line in found if "without a figure" in line
    }
    assert sum(verdict == "shown" for verdict, _ in found) == 2
    assert sum(verdict == "met" for verdict, _ in found) == len(found) - 3
    text = "\n".join(line for _, line in found)
    assert "linear 12,345 (16.0 GiB, 25% in the loss, largest 8 rows)" in text
    assert "dropped by their number <= 0.65x the full shape: 1 of 1 good, the worst both 0.60x" in text


def slower(target: str) -> Callable[[dict[str, Any]], bool]:
    """Whether a case is to be spoilt for this target to be missed."""
    return {
        "forward >= 90%": lambda c: (c["provider"], c["pass"], c["shape"]["V"]) == ("mtp_ce", "forward", 262144),
        "backward >= 90%": lambda c: (c["provider"], c["pass"], c["shape"]["V"]) == ("mtp_ce", "backward", 50257),
        "V 50257 within": lambda c: (c["provider"], c["pass"], c["shape"]["V"]) == ("mtp_ce", "forward", 50257),
        "256 rows": lambda c: (c["provider"], c["shape"]["rows"], c["pass"]) == ("mtp_ce", 256, "backward"),
        "ahead of Liger per": lambda c: c["provider"] == "mtp_ce" and c["shape"]["prompt"],
        ">= 2x the compiled": lambda c: c["provider"] == "mtp_ce" and c["shape"]["H"] == 8,
        ">= 6x the eager": lambda c: c["provider"] == "mtp_ce" and c["shape"]["H"] == 2,
        "<= 1.10x the bare": lambda c: c["provider"] == "mtp_ce" and c["shape"]["D"] == 2304,
        "< 4 GiB": lambda c: c["provider"] == "mtp_ce" and c["shape"]["rows"] == 32768,
        "ahead of Liger, 5": lambda c: c["provider"] == "mtp_ce" and c["shape"]["D"] == 4096,
        "cut-cross-entropy": lambda c: c["provider"] == "mtp_ce" and c["shape"]["D"] == 2304,
        "ahead of the compiled": lambda c: c["provider"] == "mtp_ce" and c["shape"]["D"] == 2304,
        "40% dead": lambda c: c["provider"] == "mtp_ce_dropped",
    }[target]


@pytest.mark.parametrize(
    "target",
    [
        "forward >= 90%", "backward >= 90%", "V 50257 within", "256 rows", "ahead of Liger per", ">= 2x the compiled",
        ">= 6x the eager", "<= 1.10x the bare", "< 4 GiB", "ahead of Liger, 5", "cut-cross-entropy",
        "ahead of the compiled", "40% dead",
    ],
)  # fmt: skip
def test_a_target_is_missed_by_one_part_that_misses_it_and_names_it(load: Load, target: str) -> None:
    """All the other parts are good."""
    targets = load("targets")
    spoilt = slower(target)
    cases = [
        {**case, "p20_ms": 1000 * SLOW, "share_of_ceiling": 0.1, "peak_bytes": case["peak_bytes"] + 2**32}
        if spoilt(case)
        else case
        for case in everything(targets)
    ]
    assert cases != everything(targets)
    ((verdict, line),) = [
        one for one in verdicts(targets, [a_full_run(targets, cases)], TILES) if target in one[1].partition(":")[0]
    ]
    assert verdict == "MISSED"
    assert "without" not in line


def test_a_target_that_nothing_was_measured_for_is_not_met(load: Load) -> None:
    """With what is missing, and why where the file says so."""
    targets = load("targets")
    run = a_run("cuda", [])
    absence = {"provider": "liger_heads", "pass": "both", "shape": targets.LOGITS[0].as_dict()}
    run["absent"] = [{**absence, "reason": "liger-kernel is not installed"}]
    found = verdicts(targets, [run], [])
    assert {verdict for verdict, _ in found} == {"not measured"}
    (liger,) = [line for _, line in found if "ahead of Liger per head" in line]
    assert "without V151936, V151936 prompt, " in liger
    assert liger.endswith("more (liger-kernel is not installed)")
    assert sum(map(len, (line for _, line in found))) < 5000


def test_a_target_with_one_part_unmeasured_is_not_met(load: Load) -> None:
    """However good the others are."""
    targets = load("targets")
    cases = [
        case
        for case in everything(targets)
        if (case["pass"], case["shape"]["V"], case["provider"]) != ("forward", 262144, "mtp_ce")
    ]
    run = a_full_run(targets, cases)
    found = {line: verdict for verdict, line in verdicts(targets, [run], TILES[1:])}
    ((line, verdict),) = [one for one in found.items() if "forward >= 90%" in one[0]]
    assert verdict == "not measured"
    assert f"{len(targets.FULL) - 1} of {len(targets.FULL)} good, the worst " in line
    assert line.endswith("without V262144")
    ((line, verdict),) = [one for one in found.items() if "V <= 65536" in one[0]]
    assert (verdict, "without V32000" in line) == ("not measured", True)


def test_the_shares_and_times_of_no_case_have_bounds_too(load: Load) -> None:
    """Of the slab kernel, of the cross entropy within a call, of the host."""
    targets = load("targets")
    run = a_full_run(targets, everything(targets))
    run["ce_share"][str(targets.LINEAR[3])] = 0.09
    run["host_us"]["linear both eager"] = 101.0
    older = a_run("cuda", [], host_us={"logits forward eager": 500.0, "linear forward eager": 50.0})
    tiles = [{**entry, "of_copy": 0.8 if entry["V"] == 50257 else 0.9} for entry in TILES]
    lines = [line for verdict, line in verdicts(targets, [older, run], tiles) if verdict == "MISSED"]
    assert len(lines) == 3
    assert "V50257 1.25x; 2 of 3 good, the worst V32000 1.11x" in lines[0]
    assert "V256000 D2304 9.0%; 4 of 5 good, the worst V151936 D4096 5.0%" in lines[1]
    assert "linear both eager 101; 2 of 3 good, the worst logits forward eager 60" in lines[2]


def test_figures_are_compared_within_a_run_only(load: Load) -> None:
    """A peer of one run says nothing about ours of another; the newest run that has both counts."""
    targets = load("targets")
    shape = targets.LINEAR[0]

    def first_part(*runs: dict[str, Any]) -> float | None:
        (part, *_) = targets.ahead(["cce"], [shape])(targets.File([*runs], {}))
        value: float | None = part.value
        return value

    def ours(ms: float) -> dict[str, Any]:
        return a_case(shape, "both", "mtp_ce", ms)

    peer = a_case(shape, "both", "cce", 30.0)
    assert first_part(a_run("cuda", [peer]), a_run("cuda", [ours(10)])) is None
    old, new = a_run("cuda", [ours(10), peer]), a_run("cuda", [ours(20), peer])
    assert first_part(old, new) == 1.5
    assert first_part(old, a_run("cuda", [ours(5)])) == 3.0


def test_the_figures_of_a_cpu_are_those_of_both_dtypes(load: Load) -> None:
    """Beside the logits and in their place; memory beside the gradient where there is one."""
    targets = load("targets")
    cases = []
    for shape in targets.CPU_SHAPES.values():
        cases += [
            a_case(shape, "both", "mtp_ce", 10.0, extra=2**20),
            {**a_case(shape, "both", "mtp_ce_inplace", 5.0), "peak_bytes": 3 * 2**20},
            a_case(shape, "both", "eager_loop", 90.0), a_case(shape, "both", "compiled_loop", 30.0),
        ]  # fmt: skip
    found = verdicts(targets, [a_run("cpu", cases)], [])
    assert [verdict for verdict, _ in found] == ["MISSED", "met", "met"]
    assert "fp32 9.00x, bf16 9.00x; 2 of 4 good, the worst fp32 in place 18.00x" in found[0][1]
    assert found[2][1].endswith("the worst fp32 in place 3 MiB")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.targets", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_folder_is_read_with_what_the_sweep_wrote_into_it(load: Load, tmp_path: Path) -> None:
    """Every device of it, also one that was only swept; exit code 0 whatever is missed."""
    targets, results = load("targets"), load("results")
    results.write(tmp_path / "a.json", [a_run("cuda", everything(targets)[:3])])
    results.write_json(tmp_path / "tiles" / "b.json", {**a_run("cuda", []), "tiles": TILES})
    done = run(str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("a device, measured") == 2
    assert done.stdout.count("STALE") == 2
    (swept,) = [line for line in done.stdout.splitlines() if "V <= 65536" in line and " met " in line]
    assert "3 of 3 good" in swept
    done = run(str(tmp_path / "a.json"))
    assert (done.returncode, done.stdout.count("a device")) == (0, 1)


@pytest.mark.parametrize("what", ["no file", "two", "an option", "no json"])
def test_what_is_no_results_file_is_refused_in_one_line(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    arguments = {"no file": ["none.json"], "two": ["a", "b"], "an option": ["--help"], "no json": [str(broken)]}[what]
    assert load("targets").main(arguments) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("targets: ")


def test_the_committed_files_say_something_of_every_target(load: Load) -> None:
    """Short enough to be read at once."""
    targets = load("targets")
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        lines = [*targets.lines(targets.read(path))]
        assert len(lines) >= 1 + len(targets.TARGETS[json.loads(path.read_text())["runs"][-1]["kind"]])
        assert sum(map(len, lines)) < 5000


def test_the_shapes_of_the_targets_are_those_that_were_demanded(load: Load) -> None:
    targets = load("targets")
    assert [(shape.rows, shape.D, shape.V) for shape in targets.LINEAR] == [
        (8192, 4096, 151936), (8192, 4096, 128256), (32768, 2048, 151936), (8192, 2304, 256000), (8192, 4096, 32000)
    ]  # fmt: skip
    assert {32000, 50257, 50304, 128256, 151936, 262144} <= {shape.V for shape in targets.FULL}
    assert {(shape.rows, shape.V) for shape in targets.FEW} == {(256, 151936)}
    assert targets.DEAD.live_rows < 0.61 * targets.DEAD.rows
    planned = {case.shape for case in load("plan").cases("cuda", "linear")}
    assert {*targets.LINEAR, targets.DEAD} <= planned


@pytest.mark.parametrize("S", [40, 41])
def test_the_number_of_live_rows_is_enough_to_drop_the_others(
    load: Load, monkeypatch: pytest.MonkeyPatch, S: int
) -> None:
    """It passes the check of a loss, and no row too many is worked on."""
    shapes, session, oracle = load("shapes"), load("session"), load("oracle")
    providers, slabs = load("providers"), importlib.import_module("mtp_ce.ops.chunks")
    monkeypatch.setitem(shapes.MODELS, "small", shapes.Model(301, 16, softcap=20.0))
    shape = shapes.Shape("linear", "small", S, 3, "fp32", 16, shapes.PROMPT, 2)
    problem = session.Problem(shape, shapes.make_inputs(shape, torch.device("cpu")))
    worked: list[int] = []
    select = slabs.select

    def spy(row_mask: torch.Tensor, drop: int) -> torch.Tensor:
        worked.append(len(select(row_mask, drop)))
        return select(row_mask, drop)

    monkeypatch.setattr(slabs, "select", spy)
    provider = providers.BY_NAME["linear"]["mtp_ce_dropped"]
    errors = oracle.check(problem.truth(True), session.run_once(provider, problem.inputs))
    assert all(error.acceptable for error in errors.values()), errors
    assert worked == [shape.live_rows]


def test_the_number_of_live_rows_is_given_where_it_says_something_new(load: Load) -> None:
    """On a GPU, at shapes with the prompt that it was made for."""
    targets, missing = load("targets"), load("providers").dropped_missing
    assert missing(targets.DEAD, torch.device("cuda")) is None
    assert "counts live rows" in missing(targets.DEAD, torch.device("cpu"))
    assert "prompt of 40%" in missing(targets.LINEAR[0], torch.device("cuda"))


@pytest.mark.parametrize(("N", "D", "V"), [(8192, 4096, 151936), (32768, 2048, 151936), (8192, 2304, 256000)])
def test_liger_takes_the_chunks_that_it_is_asked_for(
    load: Load, monkeypatch: pytest.MonkeyPatch, N: int, D: int, V: int
) -> None:
    """By the rule of its own source, of which nothing else is run."""
    liger = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    budget = load("peers").liger_budget(N, V, D)
    sizes: list[int] = []

    class Found(Exception):
        pass

    def stop(BT: int, chunk_size: int) -> int:
        sizes.append(chunk_size)
        raise Found

    calls = iter([liger.triton.cdiv, liger.triton.cdiv, stop])
    monkeypatch.setattr(liger.triton, "cdiv", lambda *numbers: next(calls)(*numbers))
    rows, unembed = (torch.empty(size, D, device="meta") for size in (N, V))
    with pytest.raises(Found):
        liger.fused_linear_cross_entropy_forward(
            rows, unembed, torch.empty(N, device="meta"), chunk_mem_const=budget
        )  # fmt: skip
    assert sizes == [4096]


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_the_share_of_the_kernel_is_of_the_call_that_it_is_part_of(
    load: Load, monkeypatch: pytest.MonkeyPatch, impl: str
) -> None:
    """Every launch is timed and still does its work, on a CPU and through the kernel's launcher."""
    ce_share, shapes = load("test_ce_share"), load("shapes")
    device = load("clock").DEVICE
    monkeypatch.setitem(shapes.MODELS, "small", shapes.Model(301, 16))
    shape = shapes.Shape("linear", "small", 40, 3, "bf16", 16)
    inputs = shapes.make_inputs(shape, device)
    if impl == "triton":
        kernels = importlib.import_module("mtp_ce.kernels.forward_backward")
        monkeypatch.setattr(ce_share, "KERNEL", (kernels, "launch_forward_backward"))

        def by_kernel(hidden: torch.Tensor, unembed: torch.Tensor, *rest: Any) -> torch.Tensor:
            loss: torch.Tensor = weighted_mtp_linear_ce(hidden, unembed, *rest[:2], impl=impl)
            return loss

        monkeypatch.setitem(ce_share.BY_NAME["linear"], "mtp_ce", load("provider").Provider("mtp_ce", by_kernel))
    launch = getattr(*ce_share.KERNEL)
    launched: list[int] = []

    def counted(slab: torch.Tensor, *arguments: Any, **options: Any) -> None:
        launched.append(len(slab))
        launch(slab, *arguments, **options)

    monkeypatch.setattr(*ce_share.KERNEL, counted)
    kernel, whole = ce_share.seconds(inputs)
    assert 0 < kernel < whole
    assert sum(launched) == (shape.live_rows if device.type == "cpu" else shape.rows)
    assert getattr(*ce_share.KERNEL) is counted
