"""The report of the benchmarks: tables, pages and plots state what the results hold."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PATHS = ("linear", "logits", "token_ce")
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A module of benchmarks/, which is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def a_run(load: Load, kind: str) -> dict[str, Any]:
    """A run of all cases: the n-th provider of a path takes n ms and n gradients; libraries are absent."""
    results, providers = load("results"), load("providers")
    run: dict[str, Any] = {
        "device": "NVIDIA H100 80GB HBM3" if kind == "cuda" else "2-core CPU",
        "kind": kind,
        "measured": "2026-01-01T00:00+00:00",
        "versions": {"python": "3.12.0", "torch": "2.11.0", "triton": "3.6.0", "liger-kernel": None},
        "commit": "0123456789abcdef",
        "source_hash": {part: results.source_hash(kind, part) for part in ("loss", "step")},
        "copy_bytes_per_s": 3_000_000_000_000,
        "cases": [],
        "absent": [],
        "steps": [],
    }
    for case in load("cases").cases(kind, full=True):
        those = providers.PROVIDERS[case.shape.path]
        n = 1 + those.index(case.provider) - those.index(providers.BY_NAME[case.shape.path]["mtp_ce"])
        shape = case.shape.as_dict()
        entry = {"provider": case.provider.name, "pass": case.which, "shape": shape}
        missing = case.provider.missing(case.shape, torch.device(kind)) if case.provider.ours else None
        if case.provider.name.startswith(("liger", "cce", "quack")) or missing:
            run["absent"].append({**entry, "reason": missing or "not installed"})
            continue
        peak = max(n, 1) * max(shape["gradient_bytes"], 2**20) + shape["logits_bytes"] // 10
        timing = results.timing([(n or 0.5) / 1e3] * 5, 0.5 / 1e3)
        run["cases"].append({**entry, **timing, "others_cpu": 0.0, "peak_bytes": peak, "errors": {}})
    return run


def marked(section: str, mark: str) -> dict[str, bool]:
    """Path -> whether a row of it has the mark."""
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: f"**({mark})**" in line for line in lines}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_section_has_a_row_for_every_shape_that_matters(load: Load, tmp_path: Path, kind: str) -> None:
    """Ours, share of the ceiling, memory, ratios; who was absent; one device."""
    results, report, cases = load("results"), load("report"), load("cases")
    results.write(tmp_path / "device.json", [a_run(load, kind)])
    section = report.section(tmp_path)
    lines = section.splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) == sum(len(cases.shown(kind, path)) for path in PATHS) <= 14
    assert all(line.count("|") == 8 for line in rows)
    main = cases.summary(kind, "linear")[0]
    size = f"V {main.V}, D {main.D}, N {main.rows} (H 4), {main.dtype}"
    # Our time, the ceiling's share, the memory; the loop comes two providers later and takes three times our time.
    assert rows[0].startswith(f"| `linear` {main.model}: {size} | 1.00 ms | 50% | ")
    assert f"| {(main.gradient_bytes + main.logits_bytes // 10) / 2**20:.0f} MiB (10%) | 3.00x, " in rows[0]
    assert "torch_chunked 6.00x, " in rows[0]
    assert "40% masked" in rows[1]
    assert any("masked vocabulary" in row for row in rows)
    # Where a GPU is given the number of valid rows, that is a second line.
    dropped = "| 1.00 ms<br>2.00 ms | 50%<br>25% |"
    assert [dropped in row for row in rows] == [kind == "cuda" and number == 1 for number in range(len(rows))]
    assert "stale" not in section
    (absent,) = [line for line in lines if line.startswith("* Absent")]
    assert absent.endswith("(not installed).")
    assert "commit 0123456789ab." in section
    for path in PATHS:
        assert f"(../benchmarks/plots/device-{path}.svg)" in section
    short = [line for line in report.short(tmp_path).splitlines() if "ms |" in line]
    assert len(short) == 3
    assert f"`linear` {main.model}: {size} | 1.00 ms | " in short[0]


def test_the_table_of_training_steps_is_shown(load: Load, tmp_path: Path) -> None:
    """Of the newest run that has steps, with the figures of every path."""
    run = a_run(load, "cpu")
    shape = {"model": "a Llama", "parameters": 2e6, "V": 9, "D": 8, "H": 4, "dtype": "fp32", "B": 1, "S": 16}
    run["steps"] = [{
        "provider": "linear", "shape": shape, "tokens_per_s": 1234.5, "p20_ms": 12.3, "peak_bytes": 2**21,
        "others_cpu": 0.0,
    }]  # fmt: skip
    load("results").write(tmp_path / "cpu.json", [run, a_run(load, "cpu")])
    section = load("report").section(tmp_path)
    assert "| training step of a Llama, 2 M parameters: V 9, D 8, H 4, fp32, 1 x 16 tokens | tokens/s |" in section
    assert "| linear | 1,234 | 12.3 ms | 2 MiB |" in section


def test_stale_and_noisy_results_are_marked(load: Load, tmp_path: Path) -> None:
    """Sources that changed since; another process on the CPU meanwhile."""
    results, report = load("results"), load("report")
    run = a_run(load, "cpu")
    for case in run["cases"]:
        case["others_cpu"] = 0.4 if case["shape"]["path"] == "token_ce" else 0.01
    results.write(tmp_path / "cpu.json", [run])
    section = report.section(tmp_path)
    assert marked(section, "noisy") == {"linear": False, "logits": False, "token_ce": True}
    assert "* Noisy: other processes took more than 5% of the CPU." in section
    assert not any(marked(section, "stale").values())
    run["source_hash"]["loss"] = "0" * 64
    results.write(tmp_path / "cpu.json", [run])
    section = report.section(tmp_path)
    assert all(marked(section, "stale").values())
    assert "* Stale: the sources have changed since they were timed." in section


def test_a_peer_that_does_less_work_is_marked(load: Load, tmp_path: Path) -> None:
    """Where it is faster it stands beside the best that does the same work, with a dagger."""
    run = a_run(load, "cpu")
    for case in run["cases"]:
        if case["provider"] == "torch_chunked_mean":
            case["p20_ms"] = 0.5
    load("results").write(tmp_path / "cpu.json", [run])
    section = load("report").section(tmp_path)
    assert "<br>torch_chunked_mean† 0.50x, " in section
    assert "† has no token weights" in section


def test_ratios_are_of_one_run(load: Load, tmp_path: Path) -> None:
    """A peer that only an older run has measured is absent from the row of the newer one."""
    results = load("results")
    old, new = a_run(load, "cpu"), {**a_run(load, "cpu"), "host_us": {}}
    new["cases"] = [case for case in new["cases"] if case["provider"] == "mtp_ce"]
    new["absent"] = []
    results.write(tmp_path / "cpu.json", results.merged([old], new))
    rows = [line for line in load("report").section(tmp_path).splitlines() if line.startswith("| `")]
    assert rows
    assert all("absent | absent | absent |" in row for row in rows)


def test_no_results_are_no_table(load: Load, tmp_path: Path) -> None:
    report = load("report")
    for text in (report.section(tmp_path), report.short(tmp_path)):
        assert "No results yet." in text
        assert "|" not in text


def test_the_pages_hold_what_the_report_writes(load: Load) -> None:
    """After a change of results, or of sources that make them stale: python -m benchmarks.report."""
    report = load("report")
    for path, (name, make) in report.PAGES.items():
        page = path.read_text()
        assert report.replaced(page, name, make()) == page, path.name


def test_a_page_without_markers_is_an_error(load: Load) -> None:
    replaced = load("report").replaced
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    assert replaced(f"a {begin} old {end} b", "results", "new\n") == f"a {begin}\n\nnew\n{end} b"
    with pytest.raises(ValueError, match="no section between <!-- results:begin -->"):
        replaced("a page", "results", "new")


@pytest.mark.parametrize(("kind", "path"), [("cpu", "linear"), ("cuda", "logits")])
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


def test_no_committed_number_is_without_its_run(load: Load) -> None:
    """Every committed file names its versions, its ceiling and the hash of what it timed."""
    results = load("results")
    files = sorted(results.RESULTS.glob("*.json"))
    assert files
    for path in files:
        runs = results.read(path)
        assert runs, path.name
        for run in runs:
            assert run["cases"] or run["steps"], path.name
            assert all(len(digest) == 64 for digest in run["source_hash"].values()), path.name
            assert run["copy_bytes_per_s"] > 0, path.name
            assert run["versions"]["torch"], path.name
