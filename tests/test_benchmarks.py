"""The benchmark suite itself: what it records, refuses and prints. Nothing here is about how fast anything is."""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A module of benchmarks/, which is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def small(load: Load) -> Any:
    """A problem of few rows, with its inputs and its oracle."""
    shapes, oracle, session = load("shapes"), load("oracle"), load("session")
    shape = shapes.Shape(2, 40, 3, 301, "bf16", prompt=0.3)
    inputs = shapes.make_inputs(shape, torch.device("cpu"))
    return session.Problem(shape, inputs, oracle.find_truth(shape, inputs))


def a_run(results: ModuleType, kind: str = "cpu") -> dict[str, Any]:
    return {
        "device": "NVIDIA H100 80GB HBM3" if kind == "cuda" else "2-core CPU",
        "kind": kind,
        "measured": "2026-01-01T00:00+00:00",
        "versions": {"python": "3.12.0", "torch": "2.11.0", "triton": "3.6.0", "liger-kernel": None},
        "commit": None,
        "source_hash": results.source_hash(kind),
        "copy_bytes_per_s": 3_000_000_000_000,
        "cases": [],
        "absent": [],
    }


def add_case(load: Load, run: dict[str, Any], shape: Any, provider: str, which: str, ms: float) -> None:
    moved = 2 * shape.gradient_bytes
    entry = {"provider": provider, "pass": which, "shape": shape.as_dict(), "gradient_bytes": shape.gradient_bytes}
    entry |= load("results").timing([ms / 1e3] * 5, moved, run["copy_bytes_per_s"])
    run["cases"].append({**entry, "peak_bytes": 3 * 2**20, "max_error_loss": 0.0, "max_error_d_logits": 0.0})


def test_every_shape_knows_its_live_rows(load: Load) -> None:
    shapes = load("shapes")
    small = [shapes.Shape(B, S, 4, 5, "fp32", prompt) for B, S, prompt in ((1, 3, 0), (2, 9, 0.5), (1, 20, 0.4))]
    for shape in small:
        labels = shapes.make_inputs(shape, torch.device("cpu")).labels
        assert shape.live_rows == int(shapes.live_mask(labels, shape.H).sum()), shape


@pytest.mark.parametrize("name", ["mtp_ce", "mtp_ce_inplace", "eager_loop", "eager_rows"])
def test_providers_do_the_same_work(load: Load, small: Any, name: str) -> None:
    """Each passes the check that it must pass before it is timed."""
    provider = load("providers").BY_NAME[name]
    loss, d_logits = load("session").run_once(provider, small.inputs)
    errors = load("oracle").check(small.truth, loss, d_logits)
    assert errors.acceptable, errors


@pytest.mark.parametrize("fault", ["loss", "one_gradient", "nan"])
def test_a_wrong_result_is_not_timed(load: Load, small: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    session, providers = load("session"), load("providers")

    def wrong(provider: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, d_logits = right(provider, inputs)
        if fault == "loss":
            return loss * 1.0001, d_logits
        d_logits[0, -3, 0, 7] += 1e-3 if fault == "one_gradient" else float("nan")
        return loss, d_logits

    right = session.run_once
    monkeypatch.setattr(session, "run_once", wrong)
    with pytest.raises(session.WrongResultError, match="eager_rows is not timed"):
        session.Session({}, None).qualify(providers.BY_NAME["eager_rows"], small)


def test_a_peer_that_cannot_run_is_absent_with_its_reason(load: Load, small: Any) -> None:
    """Ours that cannot run is a failure."""
    session, providers = load("session"), load("providers")

    def breaks(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this machine\nand a long story")

    current = session.Session({}, None)
    with pytest.raises(session.AbsentError, match=r"^RuntimeError: no kernel for this machine$"):
        current.qualify(providers.Provider("peer", breaks), small)
    with pytest.raises(session.AbsentError, match="needs a card"):
        current.qualify(providers.Provider("other", breaks, lambda device: "needs a card"), small)
    with pytest.raises(RuntimeError, match="no kernel"):
        current.qualify(providers.Provider("mtp_ce_new", breaks), small)
    if not torch.cuda.is_available():
        with pytest.raises(session.AbsentError, match="liger_kernel"):
            current.qualify(providers.BY_NAME["liger_rows"], small)


def test_no_case_starts_after_the_time_limit(load: Load) -> None:
    session, shapes = load("session"), load("shapes")
    with pytest.raises(session.AbsentError, match="time given"):
        session.Session({}, None, deadline=0.0).problem(shapes.CPU_SHAPES[0])


def test_memory_is_measured_above_the_inputs(load: Load) -> None:
    """In a fresh process: mtp_ce needs the gradient and little more, the eager loop several times as much."""
    memory, shapes = load("memory"), load("shapes")
    shape = shapes.Shape(1, 32, 4, 32000, "fp32")
    ours, loop = (memory.measure_cpu(shape, name) for name in ("mtp_ce", "eager_loop"))
    assert ours.forward < shape.gradient_bytes
    assert shape.gradient_bytes <= ours.both < 2 * shape.gradient_bytes < loop.both
    assert ours.of("backward") == ours.both


def test_the_hash_follows_the_sources_that_are_timed(load: Load, tmp_path: Path) -> None:
    results = load("results")
    for folder in ("kernels", "mtp_ce"):
        (tmp_path / folder).mkdir()
        for path in (ROOT / folder).glob("*.py"):
            shutil.copy(path, tmp_path / folder)
    run = a_run(results, "cuda")
    assert results.source_hash("cuda", tmp_path) == results.source_hash("cuda", ROOT)
    assert not results.is_stale(run, tmp_path)

    cpu = results.source_hash("cpu", tmp_path)
    with (tmp_path / "kernels" / "backward.py").open("a") as file:
        file.write("\n")
    assert results.is_stale(run, tmp_path)
    assert results.source_hash("cpu", tmp_path) == cpu
    (tmp_path / "mtp_ce" / "cpu.py").write_text("")
    assert results.source_hash("cpu", tmp_path) != cpu


def test_a_results_file_says_what_was_timed_and_not_where(load: Load, tmp_path: Path) -> None:
    results, providers, shapes = load("results"), load("providers"), load("shapes")
    path = tmp_path / "results" / "cpu-2core.json"
    session = load("session").Session(results.new_run("cpu", 1e10), path)
    shape, time = shapes.CPU_SHAPES[0], results.timing([0.3, 0.1, 0.2], 10**9, 1e10)
    session.add("cases", providers.BY_NAME["mtp_ce"], "both", shape, **time, peak_bytes=1, gradient_bytes=2)
    session.add("absent", providers.BY_NAME["liger_rows"], "both", shape, reason="needs a GPU")

    (run,) = results.read(path)
    assert set(run) == set(a_run(results))
    assert len(run["source_hash"]) == 64
    assert {"python", "torch", "triton", "liger-kernel"} <= set(run["versions"])
    (case,) = run["cases"]
    assert case["shape"] == {
        "B": 1, "S": 512, "H": 4, "V": 32000, "dtype": "fp32", "prompt": 0.0, "rows": 2048, "live_rows": 2038,
    }  # fmt: skip
    assert (case["p20_ms"], case["p50_ms"], case["p80_ms"]) == (140.0, 200.0, 260.0)
    assert case["share_of_copy"] == 0.5
    assert run["absent"][0]["reason"] == "needs a GPU"
    for secret in (socket.gethostname(), str(ROOT), str(Path.home()) + os.sep):
        assert secret not in path.read_text()


def test_a_new_run_takes_the_place_of_the_cases_it_measured(load: Load) -> None:
    """What it did not measure stays, with the versions and the commit of its own run."""
    results, shapes = load("results"), load("shapes")
    first, second, third = (a_run(results) | {"commit": name} for name in ("one", "two", "three"))
    for run in (first, second, third):
        run |= {"cases": [], "absent": []}
    for which in ("forward", "both"):
        add_case(load, first, shapes.CPU_SHAPES[0], "mtp_ce", which, 3.0)
    add_case(load, second, shapes.CPU_SHAPES[0], "mtp_ce", "both", 2.0)
    # An absence says nothing about a time that was measured when the provider was there.
    second["absent"].append(
        {"provider": "mtp_ce", "pass": "forward", "shape": shapes.CPU_SHAPES[0].as_dict(), "reason": "?"}
    )

    runs = results.merged([first], second)
    assert [(run["commit"], [case["pass"] for case in run["cases"]]) for run in runs] == [
        ("one", ["forward"]),
        ("two", ["both"]),
    ]
    third["cases"] = first["cases"]
    assert [run["commit"] for run in results.merged(runs, third)] == ["three"]


def test_the_table_of_a_gpu_run_is_short_and_whole(load: Load, tmp_path: Path) -> None:
    """Every shape and provider, the ratios, what is absent and why, and that the kernels have changed since."""
    results, shapes, providers = load("results"), load("shapes"), load("providers")
    run = a_run(results, "cuda") | {"source_hash": "0" * 64}
    for shape in shapes.GPU_SHAPES:
        for ms, provider in enumerate(providers.PROVIDERS[:6], start=2):
            for which in ("forward", "backward", "both"):
                add_case(load, run, shape, provider.name, which, float(ms))
        for provider in providers.PROVIDERS[6:]:
            run["absent"].append(
                {"provider": provider.name, "pass": "both", "shape": shape.as_dict(), "reason": "not installed"}
            )
    path = tmp_path / "nvidia.json"
    results.write(path, [run])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.table", str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + len(shapes.GPU_SHAPES) * 7 + 4
    assert max(map(len, lines)) <= 110, max(lines, key=len)
    assert sum("prompt" in line or "rows dead" in line for line in lines) == 1
    assert sum(line.startswith("  mtp_ce ") and " 1.00x" in line for line in lines) == len(shapes.GPU_SHAPES)
    assert sum(line.startswith("  eager_loop ") and " 2.00x" in line for line in lines) == len(shapes.GPU_SHAPES)
    assert "absent: liger_heads (11 cases), liger_rows (11 cases): not installed" in lines
    assert "3000.0 GB/s" in lines[-3]
    assert "STALE" in lines[-1]


def test_a_table_without_results_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.table", str(tmp_path / "none.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (1, "no results in none.json")


def run_suite(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SUITE)], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_the_gpu_suite_says_that_it_has_no_gpu() -> None:
    done = run_suite(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3
    assert done.stdout.splitlines() == ["gpu_suite: no GPU that torch can use; nothing was run."]


def test_the_gpu_suite_ends_with_the_table_whatever_happens_before(tmp_path: Path) -> None:
    """A stand-in for python: the tests fail, the benchmarks hang."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        '[ -n "${TRITON_INTERPRET:-}" ] && echo "interpreted" && exit 1\n'
        'case "$*" in\n'
        "    -c*) exit 0 ;;\n"
        '    *tests/kernels*) echo "FAILED tests/kernels/test_compiled.py::test_y"; echo "1 failed in 2 s"; exit 1 ;;\n'
        '    *--results*) echo "3 passed"; exec sleep 60 ;;\n'
        '    *benchmarks.table) echo "the table" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    done = run_suite(PYTHON=str(python), BENCHMARK_SECONDS="-59", TRITON_INTERPRET="1")
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[1:3] == ["FAILED tests/kernels/test_compiled.py::test_y", "1 failed in 2 s"]
    assert lines[-3:] == ["benchmarks ran out of its 1 s", "== results", "the table"]


def test_no_number_in_the_results_is_without_its_run() -> None:
    """Every committed file can be read, and names its versions, its ceiling and the hash of what it timed."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        for run in json.loads(path.read_text())["runs"]:
            assert run["cases"], path.name
            assert len(run["source_hash"]) == 64, path.name
            assert run["copy_bytes_per_s"] > 0, path.name
            assert run["versions"]["torch"], path.name
