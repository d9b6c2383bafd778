"""The report of the benchmarks: what tables, README and plots say of results, and that they say what is true."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PATHS = ("linear", "logits", "token_ce")
Load = Callable[[str], ModuleType]
STALE = "STALE: sources have changed since this run: logits"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A module of benchmarks/, which is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def a_run(load: Load, kind: str) -> dict[str, Any]:
    """A run of the whole plan: the n-th provider of a path takes n ms and n gradients; libraries are absent."""
    results = load("results")
    run: dict[str, Any] = {
        "device": "NVIDIA H100 80GB HBM3" if kind == "cuda" else "2-core CPU",
        "kind": kind,
        "measured": "2026-01-01T00:00+00:00",
        "versions": {"python": "3.12.0", "torch": "2.11.0", "triton": "3.6.0", "liger-kernel": None},
        "commit": "0123456789abcdef",
        "source_hash": {path: results.source_hash(kind, path) for path in PATHS},
        "copy_bytes_per_s": 3_000_000_000_000,
        "cases": [],
        "absent": [],
    }
    for path in PATHS:
        ours = load("providers").PROVIDERS[path].index(load("providers").BY_NAME[path]["mtp_ce"])
        for case in load("plan").cases(kind, path):
            n = 1 + load("providers").PROVIDERS[path].index(case.provider) - ours
            shape = case.shape.as_dict()
            entry = {"provider": case.provider.name, "pass": case.which, "shape": shape}
            if case.provider.name.startswith(("liger", "cce", "quack")):
                run["absent"].append({**entry, "reason": "not installed"})
                continue
            if case.provider.ours and (missing := case.provider.missing(case.shape, torch.device(kind))):
                run["absent"].append({**entry, "reason": missing})
                continue
            peak = max(n, 1) * max(shape["gradient_bytes"], 2**20) + shape["logits_bytes"] // 10
            timing = results.timing([(n or 0.5) / 1e3] * 5, 0.5 / 1e3)
            run["cases"].append({**entry, **timing, "others_cpu": 0.0, "peak_bytes": peak, "errors": {}})
    return run


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_readme_section_says_in_few_lines_what_matters(load: Load, tmp_path: Path, kind: str) -> None:
    """A row for every shape of the summary: ours, share of the ceiling, memory, ratios; who was absent; one device."""
    results, report, plan = load("results"), load("report"), load("plan")
    results.write(tmp_path / "device.json", [a_run(load, kind)])
    lines = report.section(tmp_path).splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) == sum(len(plan.shown(kind, path)) for path in PATHS) <= 12
    assert all(line.count("|") == 8 for line in rows)
    main = plan.summary(kind, "linear")[0]
    size = f"V {main.V}, D {main.D}, N {main.rows} (H 4), {main.dtype}"
    # Our time, the ceiling's share, the memory; the loop comes two providers later, and takes three times our time.
    assert rows[0].startswith(f"| `linear` {main.model}: {size} | 1.00 ms | 50% | ")
    assert f"| {(main.gradient_bytes + main.logits_bytes // 10) / 2**20:.0f} MiB (10%) | 3.00x, " in rows[0]
    assert "torch_chunked 6.00x, " in rows[0]
    assert "40% dead" in rows[1]
    # Where a GPU is told how many rows are live, that is a second line.
    dropped = "| 1.00 ms<br>2.00 ms | 50%<br>25% |"
    assert [dropped in row for row in rows] == [kind == "cuda" and number == 1 for number in range(len(rows))]
    assert any("given the number of live rows" in line for line in lines) == (kind == "cuda")
    assert "stale" not in report.section(tmp_path)
    (absent,) = [line for line in lines if line.startswith("* Absent")]
    assert absent.endswith("(not installed).")
    assert "commit 0123456789ab." in report.section(tmp_path)
    for path in PATHS:
        assert f"(benchmarks/plots/device-{path}.svg)" in report.section(tmp_path)


def test_a_result_of_other_sources_is_marked_stale(load: Load, tmp_path: Path) -> None:
    """Of the path whose sources have changed, and of no other."""
    results, report = load("results"), load("report")
    run = a_run(load, "cpu")
    run["source_hash"]["logits"] = "0" * 64
    results.write(tmp_path / "cpu.json", [run])
    section = report.section(tmp_path)
    marked = {line.split("`")[1]: "**(stale)**" in line for line in section.splitlines() if line.startswith("| `")}
    assert marked == {"linear": False, "logits": True, "token_ce": False}
    assert "Stale: the sources have changed since they were timed." in section
    assert STALE in [*load("table").table(run)]


def test_a_result_of_a_busy_machine_is_marked_noisy(load: Load, tmp_path: Path) -> None:
    results, report = load("results"), load("report")
    run = a_run(load, "cpu")
    for case in run["cases"]:
        case["others_cpu"] = 0.4 if case["shape"]["path"] == "token_ce" else 0.01
    results.write(tmp_path / "cpu.json", [run])
    section = report.section(tmp_path)
    marked = {line.split("`")[1]: "**(noisy)**" in line for line in section.splitlines() if line.startswith("| `")}
    assert marked == {"linear": False, "logits": False, "token_ce": True}
    assert "* Noisy: other processes took more than 5% of the CPU meanwhile" in section


def test_a_peer_that_does_less_work_is_marked(load: Load, tmp_path: Path) -> None:
    """It is named beside the best that does the same work where it is faster, and with a dagger."""
    results, report, table = load("results"), load("report"), load("table")
    run = a_run(load, "cpu")
    for case in run["cases"]:
        if case["provider"] == "torch_chunked_mean":
            case["p20_ms"] = 0.5
    results.write(tmp_path / "cpu.json", [run])
    section = report.section(tmp_path)
    assert "<br>torch_chunked_mean† 0.50x, " in section
    assert "† knows no token weights" in section
    assert any(line.startswith("  torch_chunked_mean†") for line in table.table(run))


def test_ratios_are_of_one_run(load: Load, tmp_path: Path) -> None:
    """A peer that only an older run has measured is absent from the row of the newer one."""
    results, report = load("results"), load("report")
    old, new = a_run(load, "cpu"), a_run(load, "cpu")
    new["cases"] = [case for case in new["cases"] if case["provider"] == "mtp_ce"]
    new["absent"] = []
    results.write(tmp_path / "cpu.json", results.merged([old], new))
    rows = [line for line in report.section(tmp_path).splitlines() if line.startswith("| `")]
    assert rows
    assert all("absent | absent | absent |" in row for row in rows)


def test_no_results_are_no_table(load: Load, tmp_path: Path) -> None:
    section = load("report").section(tmp_path)
    assert "No results yet." in section
    assert "|" not in section


def test_the_readme_holds_what_the_report_prints() -> None:
    """After a change of results, or of sources that make them stale: python -m benchmarks.report."""
    sys.path.append(str(ROOT))
    report = importlib.import_module("benchmarks.report")
    page = report.README.read_text()
    assert report.replaced(page, report.section()) == page


def test_a_readme_without_markers_is_an_error(load: Load) -> None:
    report = load("report")
    assert report.replaced(f"a {report.BEGIN} old {report.END} b", "new") == "a new b"
    with pytest.raises(ValueError, match="no section between"):
        report.replaced("a page", "new")


@pytest.mark.parametrize(("kind", "path"), [("cpu", "linear"), ("cuda", "logits"), ("cuda", "token_ce")])
def test_a_plot_names_every_line_and_is_the_same_for_the_same_results(
    load: Load, tmp_path: Path, kind: str, path: str
) -> None:
    pytest.importorskip("matplotlib")
    plots = load("plots")
    run = a_run(load, kind)
    assert plots.drawable([run], path)
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for file in (first, second):
        plots.draw([run], path, file)
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text()
    assert "<dc:date>" not in text
    ceiling = f"ceiling: {plots.CEILINGS[path]}"
    for words in ("mtp_ce", "eager_loop", "compiled_loop", "size of all logits", "Gemma-2 2B", "V 256000", ceiling):
        assert words in text, words


def test_a_path_without_points_has_no_plot(load: Load) -> None:
    run = a_run(load, "cpu")
    run["cases"] = [case for case in run["cases"] if case["shape"]["H"] == 4]
    assert load("report").drawn([run]) == []


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_table_of_a_run_is_whole(load: Load, tmp_path: Path, kind: str) -> None:
    """Every shape and provider, the ratios, each pass's share of the ceiling, and what is absent and why."""
    results, table = load("results"), load("table")
    path = tmp_path / "device.json"
    run = a_run(load, kind)
    results.write(path, [run])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.table", str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    shapes = {str(case["shape"]) for case in run["cases"]}
    timed = {(case["provider"], str(case["shape"])) for case in run["cases"]}
    reasons = {entry["reason"] for entry in run["absent"]}
    assert len(lines) == 2 + len(shapes) + len(timed) + len(reasons) + 2
    narrow = [line for line in lines if not line.startswith("absent: ")]
    assert max(map(len, narrow)) <= 130, max(narrow, key=len)
    assert sum(line.startswith("  mtp_ce ") and " 1.00x" in line for line in lines) == len(shapes)
    assert sum(line.startswith("  eager_loop ") and "00x" in line for line in lines) == len(shapes)
    # Of forward, backward and both; the in-place gradient takes twice as long.
    main = lines.index(table.shape_line(load("plan").summary(kind, "logits")[0].as_dict()))
    assert lines[main + 1].split()[:8] == ["mtp_ce", "1.00", "1.00", "1.00", "50%", "50%", "50%", "1.00"]
    assert lines[main + 2].split()[:8] == ["mtp_ce_inplace", "2.00", "2.00", "2.00", "25%", "25%", "25%", "2.00"]
    assert any(line.startswith("absent: liger") and line.endswith(": not installed") for line in lines)
    assert "3000.0 GB/s" in lines[-2]


def test_a_table_without_results_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.table", str(tmp_path / "none.json")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (1, "no results in none.json")


def test_no_number_in_the_results_is_without_its_run(load: Load) -> None:
    """Every committed file of this format names its versions, its ceiling and the hash of what it timed."""
    results = load("results")
    for path in sorted(results.RESULTS.glob("*.json")):
        for run in results.read(path):
            assert run["cases"] or results.steps_of(run), path.name
            assert all(len(run["source_hash"][path]) == 64 for path in PATHS), path.name
            assert run["copy_bytes_per_s"] > 0, path.name
            assert run["versions"]["torch"], path.name
