"""The benchmark of a training step: what it runs, refuses and records. Nothing here is about how fast anything is."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["eager", "logits", "logits in place", "linear"]
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A module of benchmarks/, which is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(autouse=True)
def brief(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, few rounds, a short copy, and a vocabulary of 301 words, of which no process but this one knows."""
    for name in ("clock", "step"):
        monkeypatch.setattr(load(name), "DEVICE", torch.device("cpu"))
        monkeypatch.setattr(load(name), "HAS_GPU", False)
    monkeypatch.setitem(load("shapes").MODELS, "small", load("shapes").Model(301, 16))
    monkeypatch.setattr(load("rounds"), "LEAST", 2)
    monkeypatch.setattr(load("rounds"), "SECONDS", 0)
    monkeypatch.setattr(load("clock"), "COPY_BYTES", 2**20)


@pytest.fixture(params=["fp32", "bf16"])
def size(request: pytest.FixtureRequest, load: Load) -> Any:
    """A model of one small layer."""
    return a_size(load, request.param)


def a_size(load: Load, dtype: str = "fp32", B: int = 2) -> Any:
    shape = load("shapes").Shape("linear", "small", 16, 4, dtype, 16, B=B)
    return load("step").Size("a tiny Llama", shape, 1, 2, 1, 32)


def without_processes(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is somebody else's test."""
    monkeypatch.setattr(load("training_step"), "peak_bytes", lambda *_: 2**20)


def run_of(load: Load, size: Any, deadline: float = float("inf")) -> dict[str, Any]:
    run = load("results").new_run("cpu", 1e10)
    load("training_step").measure(size, run, deadline, lambda: None)
    return run


def test_every_path_computes_the_loss_of_the_contract_and_its_gradients(load: Load, size: Any) -> None:
    """On the hidden states of all heads, in both dtypes; the wrapper's own forward is the linear path."""
    from mtp_ce.reference import reference_weighted_mtp_ce

    step, training_step = load("step"), load("training_step")
    training, batch = step.Training(size), step.make_batch(size.shape, 2)
    assert [path.name for path in step.PATHS] == NAMES
    assert training_step.check(training, step.PATHS, size.shape, batch) == {}
    # What the check holds them against is the reference on the model's own logits.
    logits = [x.detach().double() @ training.unembed.detach().double().t() for x in training.hidden(batch)]
    assert len(logits) == 4
    loss, *_ = reference_weighted_mtp_ce(logits, batch.tokens, batch.token_weights.double())
    for path in step.PATHS:
        assert float(training.loss(path, batch).detach()) == pytest.approx(float(loss), rel=1e-4)


def test_heads_differ_when_they_are_checked(load: Load, size: Any) -> None:
    """A path that took one head for another would be seen, in bf16 too."""
    step = load("step")
    hidden = step.Training(size).hidden(step.make_batch(size.shape, 2))
    for one, other in combinations(hidden, 2):
        assert float((one - other).detach().abs().max()) > 8 * torch.finfo(one.dtype).eps


@pytest.mark.parametrize("fault", ["loss", "gradient", "head"])
def test_a_wrong_path_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """It has a reason and no figures, the others have theirs, and the command fails."""
    step = load("step")
    # Of a loss the smallest fault is seen in bf16, too.
    size = a_size(load, "bf16" if fault == "loss" else "fp32")
    without_processes(load, monkeypatch)

    def wrong(hidden: list[torch.Tensor], *rest: torch.Tensor) -> torch.Tensor:
        if fault == "head":
            hidden = [hidden[0], hidden[2], hidden[1], hidden[3]]
        loss = step.logits_loss(hidden, *rest)
        if fault == "gradient":
            return loss.detach() + 1.01 * (loss - loss.detach())
        return loss * (1.001 if fault == "loss" else 1)

    paths = [path._replace(loss=wrong) if path.name == "logits" else path for path in step.PATHS]
    monkeypatch.setattr(step, "PATHS", tuple(paths))
    monkeypatch.setitem(step.SIZES, "cpu", size)
    run = run_of(load, size)
    reasons = {entry["provider"]: entry.get("reason") for entry in run["steps"]}
    assert reasons.pop("logits").startswith("is wrong: its ")
    assert set(reasons.values()) == {None}
    assert ["p20_ms" in entry for entry in run["steps"]] == [True, False, True, True]
    assert load("training_step").main([]) == 1


def test_a_step_is_the_same_whole_and_cut_in_two(load: Load) -> None:
    """The step that the share is measured in leaves the weights where the other leaves them."""
    step = load("step")
    size = a_size(load)
    batch = step.make_batch(size.shape, 2)
    for path in step.PATHS:
        whole, cut = step.Training(size), step.Training(size)
        for group in (*whole.optimizer.param_groups, *cut.optimizer.param_groups):
            group["lr"] = 1e-2
        whole.step(path, batch)
        assert 0 < cut.share_in_loss(path, batch) < 1
        for (name, parameter), other in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-5, msg=name)
            assert parameter.grad is None
            assert other.grad is None


def test_the_figures_of_a_path_are_of_its_steps(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    without_processes(load, monkeypatch)
    size = a_size(load)
    run = run_of(load, size)
    assert [entry["provider"] for entry in run["steps"]] == NAMES
    for entry in run["steps"]:
        assert entry["tokens_per_s"] == pytest.approx(32 / entry["p50_ms"] * 1e3, rel=1e-3)
        assert 0 < entry["share_in_loss"] < 1
        assert entry["p20_ms"] <= entry["p50_ms"] <= entry["p80_ms"]
        # No CPU refuses memory: the figure is not there.
        assert entry["largest"] is None
        shape = entry["shape"]
        assert (shape["B"], shape["S"], shape["H"], shape["V"], shape["D"]) == (2, 16, 4, 301, 16)
        # Two states of AdamW beside each weight, and a count of its steps.
        assert 0 <= shape["held_bytes"] - 12 * shape["parameters"] < 1000
        assert shape["parameters"] > 301 * 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="the process would take the GPU")
def test_memory_is_of_a_fresh_process_with_the_model(load: Load) -> None:
    """Eager holds the logits and their log-softmax; the linear path holds less by more than the logits.

    Fixed costs of a process (threads, loaded code) depend on the machine. Both peaks have them: compare the two.
    """
    step, training_step = load("step"), load("training_step")
    shape = load("shapes").Shape("linear", "Llama-2 7B", 128, 4, "fp32", 16)
    size = step.Size("a tiny Llama", shape, 1, 2, 1, 32)
    training, batch = step.Training(size), step.make_batch(shape, 1)
    eager, linear = (training_step.peak_bytes(training, size, path, batch) for path in (step.PATHS[0], step.LINEAR))
    assert linear > training.held_bytes()
    assert eager - linear > shape.logits_bytes


def test_the_largest_micro_batch_is_found_by_doubling_and_bisection(load: Load) -> None:
    training_step = load("training_step")
    for known in (1, 2, 4):
        for most in range(known, 40):
            tried: list[int] = []

            def why_not(rows: int, most: int = most, tried: list[int] = tried) -> str | None:
                tried.append(rows)
                return "out of memory" if rows > most else None

            assert training_step.largest(why_not, known) == (most, "out of memory")
            assert len(set(tried)) == len(tried) <= 11
    # Where it was not found in time, what is known is no more than a bound.
    assert training_step.largest(lambda rows: None, 1, deadline=0) == (1, "not reached in the time given")
    assert training_step.largest(lambda rows: None, 1).limit == "not reached in the time given"
    assert training_step.largest(lambda rows: "no" if rows > 5 else None, 1) == (5, "no")


@pytest.fixture
def pretended_gpu(load: Load, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Memory for as many rows as the dictionary says; the steps themselves are run on the CPU."""
    clock, step = load("clock"), load("step")
    rows = dict(zip(NAMES, (5, 7, 9, 20), strict=True))
    right = step.Training.step

    def limited(self: Any, path: Any, batch: Any) -> None:
        if len(batch.tokens) > rows[path.name]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand a long story")
        right(self, path, batch)

    monkeypatch.setattr(step.Training, "step", limited)
    monkeypatch.setattr(clock, "HAS_GPU", True)
    monkeypatch.setattr(clock, "Instant", time.perf_counter)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    return rows


def test_a_gpu_says_how_many_rows_fit(load: Load, pretended_gpu: dict[str, int]) -> None:
    """Every path is timed at the rows that all of them take, and then goes as far as it can."""
    run = run_of(load, a_size(load, B=8))
    assert {entry["provider"]: entry["largest"]["rows"] for entry in run["steps"]} == pretended_gpu
    assert {entry["largest"]["limit"] for entry in run["steps"]} == {"out of memory"}
    assert {entry["shape"]["B"] for entry in run["steps"]} == {4}
    assert {entry["peak_bytes"] for entry in run["steps"]} == {3 * 2**30}
    assert any(line.rstrip().endswith(" 20") for line in load("table").steps_table(run))


def test_a_path_that_takes_no_row_is_absent(
    load: Load, pretended_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its reason, and that is no failure."""
    pretended_gpu["eager"] = 0
    monkeypatch.setitem(load("step").SIZES, "cpu", a_size(load))
    assert load("training_step").main([]) == 0
    assert "absent: eager: out of memory" in capsys.readouterr().out.splitlines()


def test_reasons_alone_take_no_figure_away(
    load: Load, pretended_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A step that no path could do is printed, and not written over those of an older run."""
    monkeypatch.setitem(load("step").SIZES, "cpu", a_size(load))
    monkeypatch.setattr(load("training_step"), "check", lambda *_: dict.fromkeys(NAMES, "is wrong"))
    assert load("training_step").main(["--results", str(tmp_path)]) == 1
    assert [*tmp_path.iterdir()] == []


def test_no_larger_micro_batch_is_looked_for_after_the_time_limit(load: Load, pretended_gpu: dict[str, int]) -> None:
    run = run_of(load, a_size(load), deadline=0)
    assert [entry["largest"]["rows"] for entry in run["steps"]] == [2] * 4
    lines = [*load("table").steps_table(run)]
    assert sum(line.endswith(">= 2") for line in lines) == 4
    assert "largest: linear: not reached in the time given" in lines


def test_a_file_holds_cases_and_steps_beside_each_other(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps take the place of older steps alone, cases of older cases alone; all have their run."""
    results = load("results")
    without_processes(load, monkeypatch)
    monkeypatch.setitem(load("step").SIZES, "cpu", a_size(load))
    path = results.results_path("cpu", tmp_path)
    case = {"provider": "mtp_ce", "pass": "both", "shape": {"V": 1}}
    cases = {**results.new_run("cpu", 1e10), "cases": [case]}
    # As files were before there were steps.
    del cases["steps"]
    results.write(path, [cases])
    for _ in range(2):
        assert load("training_step").main(["--results", str(tmp_path)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"written to {path.name}"
    runs = results.read(path)
    assert [(len(run["cases"]), len(results.steps_of(run))) for run in runs] == [(1, 0), (0, 4)]
    assert len(runs[1]["source_hash"]["step"]) == 64
    assert runs[1]["versions"]["transformers"]
    assert runs[1]["copy_bytes_per_s"] > 0
    assert str(ROOT) not in path.read_text()

    again = {**results.new_run("cpu", 1e10), "cases": [case]}
    runs = results.merged(runs, again)
    assert [(len(run["cases"]), len(results.steps_of(run))) for run in runs] == [(0, 4), (1, 0)]


def test_steps_that_are_in_the_file_are_not_measured_again(
    load: Load, pretended_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """With --resume: where all of them went as far as memory goes, of these sources and versions."""
    training_step, results = load("training_step"), load("results")
    monkeypatch.setitem(load("step").SIZES, "cpu", a_size(load))
    command = ["--results", str(tmp_path), "--resume"]
    assert training_step.main([*command, "--time-limit", "0"]) == 0
    path = results.results_path("cpu", tmp_path)
    cut = path.read_text()
    # Not so far yet.
    assert training_step.main(command) == 0
    whole = path.read_text()
    assert whole != cut
    capsys.readouterr()
    assert training_step.main(command) == 0
    assert capsys.readouterr().out == f"all of it is in {path.name}\n"
    assert path.read_text() == whole
    (run,) = results.read(path)
    has_steps = load("resume").has_steps
    assert has_steps([run], "cpu")
    assert not has_steps([{**run, "source_hash": {**run["source_hash"], "step": "0" * 64}}], "cpu")
    assert not has_steps([{**run, "steps": [{**run["steps"][0], "reason": "is wrong"}]}], "cpu")
    assert not has_steps([{**run, "steps": []}], "cpu")


@pytest.fixture
def file(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """A results file with steps, of a GPU: the n-th path takes n times 100 ms and 4 / n rows more."""
    results = load("results")
    run = {**results.new_run("cpu", 1e12), "device": "NVIDIA H100 80GB HBM3", "commit": "0123456789abcdef"}
    shape = {
        "model": "Llama-3.2 1B", "layers": 16, "V": 128256, "D": 2048, "H": 4, "S": 2048, "B": 2, "dtype": "bf16",
        "parameters": 1_248_000_000, "held_bytes": 7 * 2**30,
    }  # fmt: skip
    run["steps"] = [
        {
            "provider": name, "shape": shape, "rounds": 10, "p20_ms": 100.0 * n, "p50_ms": 110.0 * n,
            "p80_ms": 120.0 * n, "tokens_per_s": 4096 / 0.11 / n, "share_in_loss": 0.2 * n, "peak_bytes": n * 2**33,
            "others_cpu": 0.0, "largest": {"rows": 20 // n, "limit": "out of memory"},
        }
        for n, name in zip((4, 3, 2, 1), NAMES, strict=True)
    ]  # fmt: skip
    path = tmp_path / "nvidia-h100.json"
    results.write(path, [run])
    return path, run


def test_the_table_shows_the_steps(
    load: Load, file: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = file
    assert load("table").main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "training step: Llama-3.2 1B, 1248 M parameters, V=128256 D=2048 H=4 bf16, 2 x 2048 tokens; "
        "weights and AdamW 7168 MiB"
    )
    assert [line.split()[-6:] for line in lines[2:6]] == [
        ["9309", "440.00", "400.00", "80%", "32768.0", "5"],
        ["12412", "330.00", "300.00", "60%", "24576.0", "6"],
        ["18618", "220.00", "200.00", "40%", "16384.0", "10"],
        ["37236", "110.00", "100.00", "20%", "8192.0", "20"],
    ]
    assert len(lines) == 8
    assert "1000.0 GB/s" in lines[6]
    run["source_hash"]["step"] = "0" * 64
    assert [*load("table").table(run)][-1] == "STALE: sources have changed since this run: step"


def test_the_readme_section_has_a_table_of_the_steps(load: Load, file: tuple[Path, dict[str, Any]]) -> None:
    path, run = file
    results, report = load("results"), load("report")
    section = report.section(path.parent)
    lines = section.splitlines()
    (head,) = [line for line in lines if line.startswith("| training step")]
    assert head.startswith(
        "| training step of Llama-3.2 1B, 1248 M parameters: V 128256, D 2048, H 4, bf16, 2 x 2048 tokens |"
    )
    rows = lines[lines.index(head) + 2 :][:4]
    assert rows[0] == "| eager | 9,309 | 400 ms | 80% | 32,768 MiB | 5 x 2048 tokens |"
    assert rows[3] == "| linear | 37,236 | 100 ms | 20% | 8,192 MiB | 20 x 2048 tokens |"
    assert {row.count("|") for row in (head, *rows)} == {7}
    assert "* Weights and the states of AdamW are 7,168 MiB of the peak of every training step." in lines
    assert "A training step is forward, loss, backward and AdamW" in section
    assert "commit 0123456789ab." in section
    assert "stale" not in section

    run["source_hash"]["step"] = "0" * 64
    run["steps"][0] = {"provider": "eager", "shape": run["steps"][0]["shape"], "reason": "out of memory"}
    for entry in run["steps"][1:]:
        entry.update(others_cpu=0.3, largest=None, share_in_loss=None)
    results.write(path, [run])
    section = report.section(path.parent)
    assert "2 x 2048 tokens **(stale)** **(noisy)** |" in section
    assert "\n| eager | absent | | | | |\n" in section
    assert "\n* Absent: eager (out of memory).\n" in section
    assert "\n* Largest micro-batch: a CPU's memory sets no limit to a micro-batch.\n" in section


def test_the_source_hash_of_a_step_follows_the_wrapper(load: Load, tmp_path: Path) -> None:
    results = load("results")
    for kind, more in (("cpu", "mtp_ce/ops/cpu.py"), ("cuda", "kernels/forward.py")):
        files = {file.relative_to(ROOT).as_posix() for file in results.source_files(kind, results.STEP)}
        assert {
            "mtp_ce/hf/wrapper.py",
            "mtp_ce/heads/residual.py",
            "mtp_ce/linear.py",
            "mtp_ce/ops/logits.py",
            more,
        } <= files


def test_a_training_step_without_transformers_is_absent(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, no failure, and nothing is written."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load("training_step").main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("absent: a training step needs transformers: ")
    assert [*tmp_path.iterdir()] == []


def test_a_wrong_argument_is_one_line(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for arguments, words in (
        (["--paths"], "unrecognized arguments: --paths"),
        (["--resume"], "--resume: it needs --results"),
        (["--time-limit", "long"], "invalid float value: 'long'"),
        (["--results", str(file)], "file is no folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            load("training_step").main(arguments)
        assert stopped.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert words in line


def test_an_interrupt_is_one_line_and_keeps_the_file_whole(
    load: Load, pretended_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was written before stays."""
    training_step, results = load("training_step"), load("results")
    monkeypatch.setitem(load("step").SIZES, "cpu", a_size(load))

    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training_step.Measurement, "find_largest", interrupted)
    assert training_step.main(["--results", str(tmp_path)]) == 130
    said = capsys.readouterr()
    assert said.err == "python -m benchmarks.training_step: interrupted\n"
    (run,) = results.read(results.results_path("cpu", tmp_path))
    assert len(run["steps"]) == 4
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]
