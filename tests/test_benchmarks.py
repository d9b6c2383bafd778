"""The benchmark suite: what it measures, records and refuses. No test here depends on how fast anything is."""

import importlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"
PATHS = ("linear", "logits", "token_ce")
Load = Callable[[str], ModuleType]
CPU = torch.device("cpu")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A module of benchmarks/, which is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def model(load: Load, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of 301 classes, with a softcap."""
    shapes = load("shapes")
    monkeypatch.setitem(shapes.MODELS, "small", shapes.Model(301, 16, softcap=20.0))
    return "small"


def a_problem(load: Load, path: str, model: str, dtype: str = "bf16", **more: Any) -> Any:
    """A problem of few rows, a third of them masked."""
    shapes = load("shapes")
    D = 0 if path == "logits" else 16
    shape = shapes.Shape(path, model, S=40, H=3, dtype=dtype, D=D, prompt=0.3, B=2, **more)
    return load("measure").Problem(shape, shapes.make_inputs(shape, CPU))


def a_provider(load: Load, path: str, name: str) -> Any:
    return load("providers").BY_NAME[path][name]


def a_session(load: Load, path: Path | None = None, deadline: float = float("inf"), older: Any = ()) -> Any:
    return load("measure").Session(load("results").new_run("cpu", 1e10), path, [*older], deadline)


@pytest.fixture
def benchmark_like() -> SimpleNamespace:
    """The part of pytest-benchmark's fixture that a case uses; its rounds are run, not timed."""
    stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(target: Any, setup: Any, rounds: int, warmup_rounds: int = 0) -> None:
        for _ in range(2):
            target(*setup()[0])
            stats.stats.data.append(0.25)

    return SimpleNamespace(disabled=False, pedantic=pedantic, stats=stats, group=None)


def test_every_shape_knows_its_valid_rows(load: Load, model: str) -> None:
    shapes = load("shapes")
    for B, S, prompt in ((1, 3, 0), (2, 9, 0.5), (1, 20, 0.4)):
        shape = shapes.Shape("logits", model, S, 4, "fp32", 0, prompt, B)
        labels = shapes.make_inputs(shape, CPU).labels
        assert shape.valid_rows == int((shapes.head_targets(labels, shape.H) != shapes.IGNORED).sum()), shape


def test_distributions_are_what_their_names_say(load: Load, model: str) -> None:
    """Masked classes underflow and are no label; a peaked row has nearly all probability on its label."""
    shapes, probability = load("shapes"), {}
    for distribution in shapes.DISTRIBUTIONS:
        problem = a_problem(load, "logits", model, "fp32", distribution=distribution)
        target = shapes.head_targets(problem.inputs.labels, 3)
        p = problem.inputs.values["logits"].softmax(-1)
        of_label = p.gather(-1, target.clamp(min=0)[..., None])[..., 0][target != shapes.IGNORED]
        probability[distribution] = (float(of_label.min()), float((p == 0).float().mean()))
    assert probability["peaked"][0] > 0.99 > probability["random"][0]
    assert probability["masked_vocabulary"][0] > 0
    assert probability["masked_vocabulary"][1] == pytest.approx(0.75, abs=0.01)
    assert probability["random"][1] == 0


def test_the_oracle_of_rows_is_the_oracle_of_the_contract(load: Load, model: str) -> None:
    """The row coefficients of the benchmarks reproduce loss and gradient of the reference on whole logits."""
    from mtp_ce.reference import reference_weighted_mtp_ce

    problem = a_problem(load, "linear", model)
    hidden, unembed = (x.double().requires_grad_() for x in problem.inputs.values.values())
    logits = hidden @ unembed.t()
    labels, weights, softcap = problem.inputs.rest
    loss, *_ = reference_weighted_mtp_ce(logits.unbind(2), labels, weights.double(), softcap=softcap)
    wanted = dict(zip(("d_hidden", "d_unembed"), torch.autograd.grad(loss, (hidden, unembed)), strict=True))
    truth = {expected.name: expected.value for expected in problem.truth(weighted=True)}
    torch.testing.assert_close(truth["loss"][0], loss.detach(), rtol=1e-12, atol=0)
    for name, gradient in wanted.items():
        torch.testing.assert_close(truth[name].view_as(gradient), gradient, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("path", "distribution"),
    [("linear", "random"), ("token_ce", "random"), *(("logits", d) for d in ("random", "masked_vocabulary", "peaked"))],
)
def test_providers_do_the_same_work(load: Load, model: str, path: str, distribution: str) -> None:
    """Each passes the check that precedes its timing; those that compile or need a GPU are left out."""
    measure, oracle = load("measure"), load("oracle")
    problem = a_problem(load, path, model, distribution=distribution)
    checked = []
    for provider in load("providers").PROVIDERS[path]:
        if provider.missing(problem.shape, CPU) or provider.name.startswith("compiled") or provider.ceiling:
            continue
        errors = oracle.check(problem.truth(provider.weighted), measure.run_once(provider, problem.inputs))
        assert all(error.acceptable for error in errors.values()), (provider.name, errors)
        checked.append(provider.name)
    assert {"mtp_ce", "eager_loop"} <= set(checked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("path", PATHS)
def test_liger_does_the_same_work_in_the_interpreter(load: Load, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """So that a GPU's minutes are not spent on a wrong argument."""
    pytest.importorskip("liger_kernel")
    shapes = load("shapes")
    monkeypatch.setitem(shapes.MODELS, "plain", shapes.Model(301, 16))
    problem = a_problem(load, path, "plain", "fp32")
    peers = [provider for provider in load("providers").PROVIDERS[path] if provider.name.startswith("liger")]
    assert peers
    for peer in peers:
        result = load("measure").run_once(peer, problem.inputs)
        errors = load("oracle").check(problem.truth(peer.weighted), result)
        assert all(error.acceptable for error in errors.values()), (peer.name, errors)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has no chunked version")
@pytest.mark.parametrize("name", ["torch_chunked", "torch_chunked_mean"])
def test_a_mean_over_rows_is_checked_as_one(load: Load, name: str) -> None:
    """A peer without weights passes against the plain mean, and only there."""
    shapes = load("shapes")
    shape = shapes.Shape("linear", "GPT-2", 24, 2, "fp32", 8)
    problem = load("measure").Problem(shape, shapes.make_inputs(shape, CPU))
    provider = a_provider(load, "linear", name)
    assert provider.weighted == (name == "torch_chunked")
    result = load("measure").run_once(provider, problem.inputs)
    for weighted in (True, False):
        errors = load("oracle").check(problem.truth(weighted), result)
        assert all(error.acceptable for error in errors.values()) == (weighted == provider.weighted)


def test_the_ceiling_is_the_products_and_no_more(load: Load, model: str) -> None:
    providers = load("providers")
    for path, operands in (("linear", 5), ("token_ce", 3)):
        problem = a_problem(load, path, model, "fp32")
        x, unembed, logits, *gradients = providers.operands(problem.shape, problem.inputs)
        assert problem.shape.valid_rows <= len(x) <= problem.shape.rows
        assert 3 + len(gradients) == operands
        a_provider(load, path, "bare_products").run(x, unembed, logits, *gradients)
        torch.testing.assert_close(logits, x @ unembed.t())
        for gradient, wanted in zip(gradients, (logits @ unembed, logits.t() @ x), strict=False):
            torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fault", ["value", "one_gradient", "nan"])
def test_a_wrong_result_is_not_timed(
    load: Load, model: str, monkeypatch: pytest.MonkeyPatch, fault: str, path: str
) -> None:
    """In this project it is a failure, in a peer an absence that states the error."""
    measure, problem = load("measure"), a_problem(load, path, model)

    def wrong(provider: Any, inputs: Any) -> dict[str, torch.Tensor]:
        result = right(provider, inputs)
        name = [*result][0 if fault == "value" else -1]
        result[name] = result[name].clone()
        if fault == "value":
            result[name] *= 1.1
        else:
            result[name].view(-1, result[name].shape[-1])[-17, 2] += 0.1 if fault == "one_gradient" else float("nan")
        return result

    right = measure.run_once
    monkeypatch.setattr(measure, "run_once", wrong)
    with pytest.raises(measure.WrongResultError, match=r"mtp_ce: wrong \w+: error"):
        measure.check(a_provider(load, path, "mtp_ce"), problem)
    with pytest.raises(load("providers").AbsentError, match=r"^wrong \w+: error"):
        measure.check(a_provider(load, path, "eager_loop"), problem)


def test_a_case_is_recorded_with_its_figures(
    load: Load, model: str, tmp_path: Path, benchmark_like: SimpleNamespace
) -> None:
    """Percentiles, bytes and share of the ceiling, peak memory, errors; the file names no machine and no path."""
    results, path = load("results"), tmp_path / "results" / "cpu-2core.json"
    session, shape = a_session(load, path), a_problem(load, "logits", model).shape
    case = load("cases").Case(shape, "both", a_provider(load, "logits", "mtp_ce"))
    assert session.measure(case, benchmark_like).startswith("250 ms, ")
    (run,) = results.read(path)
    (entry,) = run["cases"]
    assert (entry["p20_ms"], entry["p50_ms"], entry["p80_ms"], entry["rounds"]) == (250, 250, 250, 2)
    moved = load("measure").bytes_moved(shape, "both")
    assert entry["bytes"] == moved > shape.valid_rows * shape.V * 2
    assert entry["share_of_ceiling"] == pytest.approx(moved / 1e10 / 0.25, abs=1e-4)
    assert set(entry["errors"]) == {"loss", "d_logits"}
    assert entry["peak_bytes"] >= 0
    assert entry["shape"] == shape.as_dict()
    assert {"python", "torch", "triton", "liger-kernel", "cut-cross-entropy"} <= set(run["versions"])
    assert all(len(digest) == 64 for digest in run["source_hash"].values())
    for secret in (socket.gethostname(), str(ROOT), str(Path.home()) + os.sep):
        assert secret not in path.read_text()


def test_shares_of_the_linear_path_are_of_the_products_of_the_same_shape(
    load: Load, model: str, benchmark_like: SimpleNamespace
) -> None:
    session, shape = a_session(load), a_problem(load, "linear", model).shape
    for name in ("bare_products", "mtp_ce"):
        session.measure(load("cases").Case(shape, "both", a_provider(load, "linear", name)), benchmark_like)
    assert [entry["share_of_ceiling"] for entry in session.run["cases"]] == [1.0, 1.0]
    assert session.run["cases"][1]["operations"] == 6 * shape.valid_rows * 16 * 301


def test_a_peer_that_cannot_run_is_absent_with_its_reason(
    load: Load, model: str, benchmark_like: SimpleNamespace
) -> None:
    """Ours that cannot run is a failure."""
    providers, Case = load("providers"), load("cases").Case
    session, shape = a_session(load), a_problem(load, "logits", model).shape

    def breaks(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this machine\nand a long story")

    for name, missing, reason in (
        ("peer", lambda *_: None, "RuntimeError: no kernel for this machine"),
        ("other", lambda *_: "needs a card", "needs a card"),
    ):
        with pytest.raises(pytest.skip.Exception, match=f"^{reason}$"):
            session.measure(Case(shape, "both", providers.Provider(name, breaks, missing)), benchmark_like)
        assert session.run["absent"][-1]["reason"] == reason
    with pytest.raises(RuntimeError, match="no kernel"):
        session.measure(Case(shape, "both", providers.Provider("mtp_ce_new", breaks)), benchmark_like)
    assert session.run["cases"] == []


def test_who_breaks_the_gpu_ends_the_session_by_name(
    load: Load, model: str, monkeypatch: pytest.MonkeyPatch, benchmark_like: SimpleNamespace
) -> None:
    """Every later case would fail too, and be blamed for it."""
    measure, session = load("measure"), a_session(load)

    def breaks(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measure, "is_broken", lambda: True)
    case = load("cases").Case(
        a_problem(load, "logits", model).shape, "both", load("providers").Provider("peer", breaks)
    )
    with pytest.raises(pytest.exit.Exception, match=r"^peer broke the GPU: RuntimeError: an illegal memory access"):
        session.measure(case, benchmark_like)
    assert session.run["absent"][0]["provider"] == "peer"


def test_nothing_starts_after_the_time_limit(load: Load, model: str, benchmark_like: SimpleNamespace) -> None:
    session = a_session(load, deadline=0.0)
    case = load("cases").Case(a_problem(load, "logits", model).shape, "both", a_provider(load, "logits", "mtp_ce"))
    with pytest.raises(pytest.skip.Exception, match="--time-limit"):
        session.measure(case, benchmark_like)
    assert session.run["cases"] == session.run["absent"] == []


def test_memory_is_the_peak_above_the_inputs(load: Load) -> None:
    """mtp_ce needs the gradient and little more, the eager loop several times as much."""
    shapes, measure = load("shapes"), load("measure")
    inputs = shapes.make_inputs(shapes.Shape("logits", "Llama-2 7B", 64, 4, "fp32", 0), CPU)
    gradient = inputs.values["logits"].numel() * 4
    peaks = {}
    for name in ("mtp_ce", "eager_loop"):
        provider = a_provider(load, "logits", name)
        measure.run_once(provider, inputs)
        peaks[name] = measure.measure_memory(provider, inputs)
    assert peaks["mtp_ce"].forward_bytes < 0.5 * gradient
    assert 0.9 * gradient <= peaks["mtp_ce"].both_bytes < 1.7 * gradient < peaks["eager_loop"].both_bytes


@pytest.mark.parametrize("path", ["logits", "linear"])
def test_the_host_time_is_that_of_a_call_with_its_backward(
    load: Load, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The loss is computed once, and differentiated where "both" is asked for."""
    host = load("test_host_time")
    seen = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, leaves: seen.append([x.shape for x in grad(loss, leaves)]))
    host.step(path, "forward", False)()
    assert seen == []
    host.step(path, "both", False)()
    B, S, H, V, D = host.B, host.S, host.H, host.V, host.D
    assert seen == [[(B, S, H, V)] if path == "logits" else [(B, S, H, D), (V, D)]]


def test_the_paths_of_a_training_step_compute_the_same(load: Load, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of hidden states and output layer pass the check; a wrong path would not be timed."""
    pytest.importorskip("transformers")
    step, shapes = load("test_training_step"), load("shapes")
    shapes.MODELS["small"] = shapes.Model(301, 16)
    shape = shapes.Shape("linear", model, 12, 3, "fp32", 16, B=2)
    training = step.Training(step.Size("small", shape, 1, 2, 1, 24))
    for path in step.PATHS:
        assert all(error.acceptable for error in training.errors(path).values()), path
        training.step(path)
    monkeypatch.setitem(step.PATHS, "eager", lambda *inputs: 1.01 * step.eager_loss(*inputs))
    assert not any(error.acceptable for error in training.errors("eager").values())
    assert training.described()["held_bytes"] >= 3 * 4 * training.described()["parameters"]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_full_suite_covers_models_heads_and_providers(load: Load, kind: str) -> None:
    """Every path, at the vocabularies of five models and at four horizons; by default its first part."""
    cases, providers = load("cases"), load("providers")
    full = [*cases.cases(kind, full=True)]
    assert len(set(map(str, full))) == len(full)
    default = [*cases.cases(kind, full=False)]
    assert set(map(str, default)) < set(map(str, full))
    for path in PATHS:
        mine = [case for case in full if case.shape.path == path]
        assert {32000, 50257, 128256, 152064, 256000} <= {case.shape.V for case in mine}
        assert {1, 2, 4, 8} <= {case.shape.H for case in mine}
        assert {case.shape.softcap for case in mine if case.shape.V == 256000} == {30.0}
        first = [case for case in full if case.shape == cases.summary(kind, path)[0]]
        assert {case.provider for case in first} == set(providers.PROVIDERS[path])
        assert {case.which for case in first} == set(cases.PASSES[path])
        # A ceiling is measured before what is held against it.
        assert path == "logits" or mine[0].provider.ceiling
    logits = [case.shape for case in default if case.shape.path == "logits"]
    assert {shape.distribution for shape in logits} == {"random", "masked_vocabulary", "peaked"}


def run_pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest over the benchmarks, without a GPU."""
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks", "--benchmark-only", *arguments]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    # A worker of pytest-xdist passes its own variables on, under which pytest-benchmark does not time.
    for name in [name for name in env if name == "TRITON_INTERPRET" or name.startswith("PYTEST_XDIST")]:
        del env[name]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=env)


def test_a_run_shows_its_progress_and_is_resumed(tmp_path: Path) -> None:
    """Two small cases: a line for each, the table, the file; resumed, one more case joins the same run."""
    chosen = "token_ce and D256-H1 and (bare_products or eager_loop)"
    first = run_pytest("--full", f"--results={tmp_path}", "-k", chosen)
    assert first.returncode == 0, first.stdout + first.stderr
    lines = [line for line in first.stdout.splitlines() if re.match(r"\[\d/2\]", line)]
    name = r"\[1/2\] test_loss\[token_ce-.*-bare_products\]"
    wanted = name + r": \S+ ms, 100% of the ceiling; \d+:\d\d elapsed, about .* left"
    assert re.fullmatch(wanted, lines[0]), lines
    assert len(lines) == 2
    assert "written to cpu-" in first.stdout
    second = run_pytest("--full", f"--results={tmp_path}", "--resume", "-k", chosen.replace("eager_loop", "mtp_ce"))
    assert "-bare_products]: in the resumed run;" in second.stdout, second.stdout
    (file,) = tmp_path.glob("*.json")
    (run,) = json.loads(file.read_text())["runs"]
    assert [case["provider"] for case in run["cases"]] == ["bare_products", "eager_loop", "mtp_ce"]
    assert run["cases"][2]["share_of_ceiling"] > 0


def test_resume_without_a_folder_is_refused(load: Load) -> None:
    config = SimpleNamespace(getoption={"--resume": True, "--results": None}.get)
    with pytest.raises(pytest.UsageError, match="--resume needs --results, the folder of the file to resume"):
        load("conftest").pytest_configure(config)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_hash_follows_the_sources_that_are_timed(load: Load, tmp_path: Path, kind: str) -> None:
    """The operators, on a GPU the kernels, and for a training step the model around; nothing else."""
    results = load("results")
    files = [f"{folder}/new.py" for folder in ("mtp_ce/ops", "mtp_ce/heads", "kernels", "mtp_ce")]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    changed = {}
    for name in files:
        run = {"kind": kind, "source_hash": {p: results.source_hash(kind, p, tmp_path) for p in ("loss", "step")}}
        (tmp_path / name).write_text("x")
        changed[name] = {part for part in ("loss", "step") if results.is_stale(run, part, tmp_path)}
    kernels = {"loss", "step"} if kind == "cuda" else set()
    assert [*changed.values()] == [{"loss", "step"}, {"step"}, kernels, set()]
    for by_part in results.SOURCES.values():
        assert all([*ROOT.glob(pattern)] for patterns in by_part.values() for pattern in patterns)


def test_a_new_run_replaces_the_cases_it_measured(load: Load) -> None:
    """What it did not measure stays, with the versions and the commit of its own run."""
    results = load("results")

    def a_run(commit: str, *passes: str, **host: float) -> dict[str, Any]:
        cases = [{"provider": "mtp_ce", "pass": which, "shape": {"V": 1}} for which in passes]
        return {"commit": commit, "cases": cases, "absent": [], "steps": [], "host_us": host}

    first, second = a_run("one", "forward", "both", a=1.0, b=2.0), a_run("two", "both", b=3.0)
    # An absence does not replace a time that was measured when the provider was there.
    second["absent"].append({"provider": "mtp_ce", "pass": "forward", "shape": {"V": 1}, "reason": "?"})
    runs = results.merged([first], second)
    assert [(run["commit"], [case["pass"] for case in run["cases"]]) for run in runs] == [
        ("one", ["forward"]),
        ("two", ["both"]),
    ]
    assert [run["host_us"] for run in runs] == [{"a": 1.0}, {"b": 3.0}]
    assert [run["commit"] for run in results.merged(runs, a_run("three", "forward", "both", a=1.0, b=1.0))] == ["three"]


def test_only_the_same_device_versions_and_sources_are_resumed(load: Load) -> None:
    results = load("results")
    run = results.new_run("cpu", 1e10)
    assert results.is_resumable([run], {**run, "measured": "later"})
    assert not results.is_resumable([], run)
    for name in ("device", "versions", "commit", "source_hash"):
        assert not results.is_resumable([{**run, name: "another"}], run), name


def test_a_file_of_another_format_holds_no_results(load: Load, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"runs": [{"cases": [{"provider": "mtp_ce"}]}]}')
    assert load("results").read(tmp_path / "old.json") == []


def run_suite(*parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SUITE), *parts], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A stand-in for python that notes its arguments: device tests fail, the other tests hang, benchmarks pass."""
    path = tmp_path / "python"
    path.write_text(
        f"""#!/bin/bash
echo "$PYTHONPATH ${{*//[[:space:]]/ }}" >>{tmp_path}/calls
[ -n "${{TRITON_INTERPRET:-}}" ] && echo interpreted && exit 1
case "$*" in
    "-c import xdist") exit 1 ;;
    -c*) ;;
    *"-k (gpu or"*) echo "E   first"; echo "FAILED tests/test_docs.py::test_x - E"; echo "1 failed in 2 s"; exit 1 ;;
    *"-k not gpu"*) echo "[gw3] [ 13%] FAILED tests/test_house.py::test_y "; exec sleep 60 ;;
    *) echo "3 passed" ;;
esac
"""
    )
    path.chmod(0o755)
    return path


def test_the_gpu_suite_reports_that_there_is_no_gpu() -> None:
    done = run_suite(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3
    assert done.stdout.splitlines() == ["gpu_suite: no GPU that torch can use; nothing was run."]


def test_the_gpu_suite_names_what_failed_in_each_part(python: Path, tmp_path: Path) -> None:
    """Also of a part that was killed; the logs keep all output, and the benchmarks write to the caller's folder."""
    logs, folder = tmp_path / "logs", tmp_path / "results"
    done = run_suite(
        PYTHON=str(python), LOGS=str(logs), RESULTS=str(folder), TEST_SECONDS="1", TRITON_INTERPRET="1", PYTHONPATH="/p"
    )
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "== device (at most 100 s)", "E   first", "FAILED tests/test_docs.py::test_x - E", "1 failed in 2 s",
        "== tests (at most 1 s)", "FAILED tests/test_house.py::test_y", "tests ran out of its 1 s",
        "[gw3] [ 13%] FAILED tests/test_house.py::test_y ",
        "== benchmarks (at most 195 s)", "3 passed",
    ]  # fmt: skip
    assert {path.name for path in logs.iterdir()} == {"gpu.log", "device.log", "tests.log", "benchmarks.log"}
    calls = (tmp_path / "calls").read_text().splitlines()
    # What is installed elsewhere stays importable, after this tree.
    assert all(call.startswith(".:/p -") for call in calls)
    (benchmarks,) = [call for call in calls if "--benchmark-only" in call]
    assert f"--full --results={folder} --resume --time-limit 150" in benchmarks
    for call in calls:
        if "tests/mtp_ce" in call:
            assert call.index("test_gpu.py") < call.index("test_random_cases.py")
            assert "tests/kernels/test_splits.py" in call
            assert "test_compiled" not in call


def test_the_gpu_suite_runs_the_parts_that_are_asked_for(python: Path, tmp_path: Path) -> None:
    """In its own order; relative folders are the caller's."""
    done = run_suite("benchmarks", "device", PYTHON=str(python), RESULTS="here")
    heads = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("== ")]
    assert heads == ["device", "benchmarks"]
    assert f"--results={Path.cwd() / 'here'} " in (tmp_path / "calls").read_text()
    done = run_suite("device", "bench", PYTHON=str(python))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'gpu_suite: no part "bench"; expected device tests benchmarks.\n'


def test_device_and_tests_are_two_halves() -> None:
    """What one part leaves out, the other runs."""
    halves = re.findall(r'-k "(.*?) and not cpu"|-k "(not .*?) and not cpu"', SUITE.read_text())
    assert [one or other for one, other in halves] == ["(gpu or test_splits)", "not gpu and not test_splits"]
