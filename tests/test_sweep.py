"""The sweep over tiles: what it tries and what it refuses. Nothing here is about how fast anything is."""

import importlib
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mtp_ce.kernels.results import RowResults, Rows
from mtp_ce.options import LossOptions

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/sweep.py, which is not installed, with two sizes of tiles and two rounds."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.sweep")
    monkeypatch.setattr(module, "STRIPS", (1, 2))
    monkeypatch.setattr(module, "THREADS", (128,))
    monkeypatch.setattr(module, "ROUNDS", 2)
    return module


@pytest.mark.parametrize("name", ["forward", "backward", "slab"])
def test_every_kernel_runs_in_every_tile(sweep: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in the tile that the project has chosen; the one asked for is the one launched."""
    kernel = sweep.KERNELS[name]
    launched: list[tuple[int, int, int]] = []
    jitted = getattr(kernel.module, "forward_backward_kernel" if name == "slab" else f"{name}_kernel")
    run = type(jitted).run

    def spy(self, *arguments, **options):  # type: ignore[no-untyped-def]
        if self is jitted:
            # The gradient of a slab has strips of its own.
            launched.append((options["STRIPS"], options.get("GRADIENT_STRIPS", 0), options["THREADS"]))
        return run(self, *arguments, **options)

    monkeypatch.setattr(type(jitted), "run", spy)
    entries = sweep.sweep_tiles(name, sweep.Problem(3, 2, 3001, torch.float32), 1e9, DEVICE)
    twice = ["1x128, 1x128", "1x128, 2x128", "2x128, 1x128", "2x128, 2x128"]
    assert [entry["tile"] for entry in entries] == ["as is", *(twice if name == "slab" else ["1x128", "2x128"])]
    assert sum(entry["fastest"] for entry in entries) == 1
    assert all(entry["p20_ms"] > 0 and entry["of_copy"] > 0 for entry in entries)
    wanted = product((1, 2), (1, 2) if name == "slab" else (0,), (128,))
    assert {*wanted} <= set(launched)
    assert name in sweep.line(entries[0])


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_programs_are_swept_from_none_that_share_a_row(
    sweep: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kernels/tiles.py decides it, with another threshold."""
    decided: list[int] = []
    module = sweep.KERNELS[name].module
    decide = module.row_splits

    def spy(*arguments: int) -> int:
        decided.append(decide(*arguments))
        return decided[-1]

    monkeypatch.setattr(module, "row_splits", spy)
    monkeypatch.setattr(module, "processors", lambda device: 1)
    monkeypatch.setattr(sweep, "PROGRAMS", (64,))
    entries = sweep.sweep_programs(name, sweep.Problem(2, 1, 30011, torch.float32), 1e9, DEVICE)
    assert [entry["least_programs"] for entry in entries] == [0, 64]
    assert min(decided) == 1
    assert max(decided) > 1


def test_a_tile_that_cannot_run_is_an_entry_with_its_reason(sweep: ModuleType) -> None:
    """The others are timed all the same."""

    def fails() -> None:
        raise RuntimeError("out of registers\nsecond line")

    outcome = sweep.race({"a": fails, "b": lambda: None})
    assert outcome["a"] == "RuntimeError: out of registers"
    assert isinstance(outcome["b"], float)
    (entry,) = sweep._entries("forward", sweep.KERNELS["forward"].problems[0], {"4x256": "no"}, "tile", 1e9)
    assert entry["failed"] == "no"
    assert sweep.line(entry).endswith("no")


def test_every_model_is_swept_with_the_softcap_that_it_has(sweep: ModuleType) -> None:
    """The tiles of a softcap are others; and the slab's rows are apart as the linear path's are."""
    for name, kernel in sweep.KERNELS.items():
        capped = {problem.V for problem in kernel.problems if problem.softcap}
        plain = {problem.V for problem in kernel.problems if not problem.softcap}
        assert capped == {256000}, name
        assert {32000, 50257, 50304, 128256, 151936, 262144} <= plain, name


def test_the_slab_is_cut_as_the_linear_path_cuts_it(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd vocabulary has rows that begin at vectors, and the softcap arrives."""
    seen: list[tuple[tuple[int, int], int, float | None]] = []

    def spy(logits: torch.Tensor, rows: Rows, results: RowResults, options: LossOptions, **_: bool) -> None:
        seen.append((tuple(logits.shape), logits.stride(0) * logits.element_size() % 16, options.softcap))

    monkeypatch.setattr(sweep.KERNELS["slab"].module, "launch_forward_backward", spy)
    sweep.KERNELS["slab"].call(sweep.Problem(3, 2, 301, torch.bfloat16, 30.0), DEVICE)()
    assert seen == [((6, 301), 0, 30.0)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.sweep", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_kernel_that_does_not_exist_is_refused_by_name() -> None:
    """Exit code 2, the names that exist."""
    done = run("sideways")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sweep: no kernel 'sideways'; expected slab, forward, backward.\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_without_a_gpu_it_says_so() -> None:
    """Exit code 3, and nothing is written."""
    done = run()
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "sweep: no GPU that torch can use; nothing was run.\n"


def test_what_it_writes_names_the_kernels_it_timed(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commit, versions and the hash of the sources, what a line was printed of, and nothing else."""
    results = importlib.import_module("benchmarks.results")
    slab = sweep.KERNELS["slab"]._replace(problems=(sweep.Problem(3, 2, 3001, torch.float32, 30.0),))
    monkeypatch.setattr(sweep, "KERNELS", {"slab": slab})
    monkeypatch.setattr(sweep, "HAS_GPU", True)
    monkeypatch.setattr(sweep, "DEVICE", DEVICE)
    monkeypatch.setattr(sweep, "copy_bandwidth", lambda: 1e9)
    assert sweep.main(["--results", str(tmp_path)]) == 0
    (path,) = (tmp_path / "tiles").iterdir()
    written = json.loads(path.read_text())
    assert [entry["tile"] for entry in written["tiles"]][:2] == ["as is", "1x128, 1x128"]
    assert {entry["softcap"] for entry in written["tiles"]} == {30.0}
    assert written["source_hash"]["logits"] == results.source_hash(DEVICE.type, "logits")
    assert set(written) == {
        "device", "kind", "measured", "versions", "commit", "source_hash", "copy_bytes_per_s", "tiles"
    }  # fmt: skip
