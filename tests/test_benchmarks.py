"""The benchmark suite itself: what it measures, records and refuses. Nothing here is about how fast anything is."""

import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"
PATHS = ("linear", "logits", "token_ce")
Load = Callable[[str], ModuleType]


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


@pytest.fixture(params=PATHS)
def small(request: pytest.FixtureRequest, load: Load, model: str) -> Any:
    """A problem of few rows on each path, a third of them dead."""
    return a_problem(load, request.param, model)


def a_problem(load: Load, path: str, model: str, dtype: str = "bf16") -> Any:
    shapes = load("shapes")
    shape = shapes.Shape(path, model, S=40, H=3, dtype=dtype, D=0 if path == "logits" else 16, prompt=0.3, B=2)
    return load("session").Problem(shape, shapes.make_inputs(shape, torch.device("cpu")))


def a_provider(load: Load, path: str, name: str) -> Any:
    return load("providers").BY_NAME[path][name]


def test_every_shape_knows_its_live_rows(load: Load, model: str) -> None:
    shapes = load("shapes")
    for B, S, prompt in ((1, 3, 0), (2, 9, 0.5), (1, 20, 0.4)):
        shape = shapes.Shape("logits", model, S, 4, "fp32", 0, prompt, B)
        labels = shapes.make_inputs(shape, torch.device("cpu")).labels
        assert shape.live_rows == int((shapes.head_targets(labels, shape.H) != shapes.IGNORED).sum()), shape


def test_the_oracle_of_rows_is_the_oracle_of_the_contract(load: Load, model: str) -> None:
    """The rule of a row in the benchmarks gives the loss and the gradient of the reference on whole logits."""
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


@pytest.mark.parametrize("path", PATHS)
def test_providers_do_the_same_work(load: Load, model: str, path: str) -> None:
    """Each passes the check that it must pass before it is timed; those that compile or need a GPU are left out."""
    session, oracle = load("session"), load("oracle")
    problem = a_problem(load, path, model)
    names = []
    for provider in load("providers").PROVIDERS[path]:
        if provider.missing(problem.shape, torch.device("cpu")) or provider.compiled or provider.ceiling:
            continue
        found = session.run_once(provider, problem.inputs)
        errors = oracle.check(problem.truth(provider.weighted), found)
        assert all(error.acceptable for error in errors.values()), (provider.name, errors)
        names.append(provider.name)
    assert {"mtp_ce", "eager_loop"} <= set(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("path", PATHS)
def test_liger_does_the_same_work_in_the_interpreter(load: Load, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """So that a GPU's minutes are not spent on finding a wrong argument."""
    pytest.importorskip("liger_kernel")
    shapes = load("shapes")
    monkeypatch.setitem(shapes.MODELS, "plain", shapes.Model(301, 16))
    problem = a_problem(load, path, "plain", "fp32")
    peers = [provider for provider in load("providers").PROVIDERS[path] if provider.name.startswith("liger")]
    assert peers
    for peer in peers:
        found = load("session").run_once(peer, problem.inputs)
        errors = load("oracle").check(problem.truth(peer.weighted), found)
        assert all(error.acceptable for error in errors.values()), (peer.name, errors)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has no chunked version")
@pytest.mark.parametrize("name", ["torch_chunked", "torch_chunked_mean"])
def test_a_mean_over_rows_is_checked_as_one(load: Load, name: str) -> None:
    """A peer that knows no weights must give the plain mean, and would fail as the weighted loss."""
    oracle, session, shapes = load("oracle"), load("session"), load("shapes")
    shape = shapes.Shape("linear", "GPT-2", 24, 2, "fp32", 8)
    problem = session.Problem(shape, shapes.make_inputs(shape, torch.device("cpu")))
    provider = a_provider(load, "linear", name)
    assert provider.weighted == (name == "torch_chunked")
    found = session.run_once(provider, problem.inputs)
    for weighted in (True, False):
        errors = oracle.check(problem.truth(weighted), found)
        assert all(error.acceptable for error in errors.values()) == (weighted == provider.weighted)


def test_the_ceiling_is_the_products_and_no_more(load: Load, model: str) -> None:
    products = load("products")
    for path, operands in (("linear", 5), ("token_ce", 3)):
        problem = a_problem(load, path, model, "fp32")
        x, unembed, logits, *gradients = products.operands(problem.shape, problem.inputs)
        assert problem.shape.live_rows <= len(x) <= problem.shape.rows
        assert 3 + len(gradients) == operands
        a_provider(load, path, "bare_products").run(x, unembed, logits, *gradients)
        torch.testing.assert_close(logits, x @ unembed.t())
        for gradient, wanted in zip(gradients, (logits @ unembed, logits.t() @ x), strict=False):
            torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("fault", ["value", "one_gradient", "nan"])
def test_a_wrong_result_is_not_timed(load: Load, small: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Of this project it is a failure, of a peer an absence that says how wrong it is."""
    session, provider = load("session"), load("provider")

    def wrong(provider: Any, inputs: Any) -> dict[str, torch.Tensor]:
        found = right(provider, inputs)
        name = [*found][0 if fault == "value" else -1]
        found[name] = found[name].clone()
        if fault == "value":
            found[name] *= 1.1
        else:
            found[name].view(-1, found[name].shape[-1])[-17, 2] += 0.1 if fault == "one_gradient" else float("nan")
        return found

    right = session.run_once
    monkeypatch.setattr(session, "run_once", wrong)
    with pytest.raises(session.WrongResultError, match=r"mtp_ce is wrong: its \w+ errs by"):
        session.Session({}, None).qualify(a_provider(load, small.shape.path, "mtp_ce"), small)
    with pytest.raises(provider.AbsentError, match=r"^is wrong: its \w+ errs by"):
        session.Session({}, None).qualify(a_provider(load, small.shape.path, "eager_loop"), small)


def test_a_peer_that_cannot_run_is_absent_with_its_reason(load: Load, small: Any) -> None:
    """Ours that cannot run is a failure."""
    session, provider = load("session"), load("provider")

    def breaks(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this machine\nand a long story")

    current = session.Session({}, None)
    with pytest.raises(provider.AbsentError, match=r"^RuntimeError: no kernel for this machine$"):
        current.qualify(provider.Provider("peer", breaks), small)
    with pytest.raises(provider.AbsentError, match="needs a card"):
        current.qualify(provider.Provider("other", breaks, lambda shape, device: "needs a card"), small)
    with pytest.raises(RuntimeError, match="no kernel"):
        current.qualify(provider.Provider("mtp_ce_new", breaks), small)


def test_every_peer_says_what_keeps_it_from_a_machine(load: Load, model: str) -> None:
    """On a CPU: a GPU. With a softcap: the softcap that it lacks."""
    shape = a_problem(load, "linear", model).shape
    plain = a_problem(load, "linear", "Llama-2 7B").shape
    linear = load("providers").PROVIDERS["linear"]
    reasons = {provider.name: provider.missing(shape, torch.device("cpu")) for provider in linear}
    for name in ("liger", "liger_mean", "cce", "cce_exact", "quack_mean"):
        assert reasons[name] == "GPU kernels only", reasons
    assert all(reasons[name] is None for name in ("bare_products", "mtp_ce", "eager_loop", "compiled_loop"))
    torch_chunked = a_provider(load, "linear", "torch_chunked")
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert "no softcap" in reasons["torch_chunked"]
        assert torch_chunked.missing(plain, torch.device("cpu")) is None
    else:
        assert "has no chunked linear_cross_entropy" in torch_chunked.missing(plain, torch.device("cpu"))


@pytest.fixture
def quick(load: Load, model: str, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A session of four providers on few logits: it notes who is examined, which takes 10 s each; rounds take none.

    `broken` names the provider that breaks the device.
    """
    session, clock, plan = load("session"), load("clock"), load("plan")
    problem = a_problem(load, "logits", model)
    names = ["eager_loop", "eager_rows", "mtp_ce", "mtp_ce_inplace"]
    cases = [plan.Case(problem.shape, "both", a_provider(load, "logits", name), 0) for name in names]
    quick = SimpleNamespace(cases=cases, problem=problem, now=0.0, examined=[], broken=None)

    def examined(provider: Any, inputs: Any) -> Any:
        quick.examined.append(provider.name)
        quick.now += 10
        if provider.name == quick.broken:
            raise RuntimeError("an illegal memory access was encountered\nand a long story")
        return right(provider, inputs)

    def synchronize() -> None:
        if quick.broken in quick.examined:
            raise RuntimeError("an illegal memory access was encountered")

    def monotonic() -> float:
        quick.now += 1e-6
        return quick.now

    def begin(deadline: float = float("inf"), path: Path | None = None, resumed: Any = ()) -> Any:
        run = load("results").new_run("cpu", 1e10)
        quick.examined.clear()
        quick.session = session.Session(run, path, deadline, cases, resumed)
        quick.session._problem = problem
        problem.outcomes.clear()
        problem.seconds.clear()
        return quick.session

    right = session.run_once
    monkeypatch.setattr(session, "run_once", examined)
    monkeypatch.setattr(session.time, "monotonic", monotonic)
    monkeypatch.setattr(clock, "HAS_GPU", True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    memory = load("memory")
    monkeypatch.setattr(memory, "begin_cpu", lambda *_: SimpleNamespace(result=lambda: memory.Peak(0, 0)))
    monkeypatch.setattr(load("rounds"), "in_turns", lambda calls: {name: [1.0] for name in calls})
    quick.begin = begin
    return quick


def test_nothing_starts_after_the_time_limit(load: Load, quick: SimpleNamespace) -> None:
    """No provider, no turn, no shape. Who was examined before is timed: this project first of all."""
    session, absent = quick.begin(deadline=25), load("provider").AbsentError
    for case in quick.cases:
        if case.provider.name == "eager_rows":
            with pytest.raises(absent, match="time given"):
                session.seconds(case, quick.problem)
        else:
            assert session.seconds(case, quick.problem) == [1.0]
    assert quick.examined == ["mtp_ce", "mtp_ce_inplace", "eager_loop"]
    with pytest.raises(absent, match="time given"):
        session.seconds(quick.cases[0]._replace(which="forward"), quick.problem)
    session._problem = None
    with pytest.raises(absent, match="time given"):
        session.problem(quick.problem.shape)


@pytest.mark.parametrize("broken", ["eager_rows", "mtp_ce_inplace"])
def test_who_breaks_the_gpu_ends_the_session_by_name(
    load: Load, quick: SimpleNamespace, tmp_path: Path, broken: str
) -> None:
    """Nobody else is called absent for it, and the next session goes on without it: a peer on the whole path."""
    case, results, path = load("case"), load("results"), tmp_path / "file.json"
    quick.broken = broken
    benchmark = SimpleNamespace(disabled=False, extra_info={}, pedantic=lambda *_, **__: None)
    session = quick.begin(path=path)
    session.run["host_us"] = {"a call": 1.0}
    words = f"{broken} has broken the GPU: RuntimeError: an illegal memory access was encountered"
    with pytest.raises(pytest.exit.Exception, match=f"^{words}$"):
        case.measure(benchmark, session, quick.cases[0])
    (run,) = results.read(path)
    assert run["cases"] == []
    assert [(entry["provider"], entry["reason"]) for entry in run["absent"]] == [(broken, words)]

    for _ in range(2):
        session = quick.begin(path=path, resumed=results.read(path))
        for one in quick.cases:
            refused = pytest.raises((RuntimeError, pytest.skip.Exception), match=words)
            with refused if one.provider.name == broken else nullcontext():
                case.measure(benchmark, session, one)
        assert broken not in quick.examined
        assert [entry["provider"] for entry in session.run["cases"]] == [
            one.provider.name for one in quick.cases if one.provider.name != broken
        ]
    other = replace(quick.problem.shape, S=41)
    provider = a_provider(load, "logits", broken)
    known = load("resume").breaks(provider, other, results.read(path), "cpu")
    assert known == (None if provider.ours else words)


def test_a_gpu_that_breaks_in_the_rounds_ends_all_of_them(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later providers would be blamed for it."""
    clock, rounds = load("clock"), load("rounds")

    def breaks(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(clock, "HAS_GPU", True)
    monkeypatch.setattr(torch.cuda, "synchronize", breaks)
    monkeypatch.setattr(rounds, "timed", lambda call, *_: call() or 1.0)
    with pytest.raises(clock.LostDeviceError, match=r"^b has broken the GPU: RuntimeError"):
        rounds.in_turns({"a": (tuple, lambda: None), "b": (tuple, breaks), "c": (tuple, breaks)})


def test_the_time_counts_from_the_start_of_the_process() -> None:
    """Imports are in it."""
    program = (
        "import time; first = time.monotonic(); from benchmarks import clock; "
        "print(time.monotonic() - first, clock.age(), time.monotonic() - clock.deadline(0), clock.age())"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    whole = time.monotonic() - start
    readings = [*map(float, done.stdout.split()), whole]
    # The start of a process is known to a hundredth of a second.
    assert all(earlier <= later + 0.02 for earlier, later in pairwise(readings)), readings


def test_the_copy_is_timed_on_a_warm_device(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is before is thrown away; p20 of the rest, as the cases."""
    clock = load("clock")
    seconds: list[float] = []
    copies: list[int] = []

    def timed(run: Callable[..., Any], *arguments: Any) -> float:
        run(*arguments)
        seconds.append(float(1 + len(seconds)))
        return seconds[-1]

    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: copies.append(len(seconds)) or copy(self, other))
    for name, value in (("timed", timed), ("COPY_BYTES", 2**10), ("WARM_UP", 7), ("COPIES", 11)):
        monkeypatch.setattr(clock, name, value)
    assert clock.copy_bandwidth() == 2 * 2**10 / 3
    assert copies[:8] == [0] * 8
    assert len(copies) == 18


def a_run_with(load: Load, cases: Any, absent: Any = (), **changed: Any) -> dict[str, Any]:
    def entries(which: Any, **more: Any) -> list[dict[str, Any]]:
        return [
            {"provider": c.provider.name, "pass": c.which, "shape": c.shape.as_dict(), **more} for c in which
        ]  # fmt: skip

    run = load("results").new_run("cpu", 1e10)
    return {**run, "cases": entries(cases), "absent": [*entries(absent, reason="needs a card")], **changed}


def test_what_is_compared_is_whole_in_one_run_or_measured_again(load: Load) -> None:
    """All of a shape and a pass: whoever is missing is measured beside all that it is compared with."""
    left = load("resume").left
    every = [case for path in PATHS for case in load("plan").cases("cpu", path)]
    group = [case for case in every if (case.shape, case.which) == (every[0].shape, every[0].which)]
    rest = {case: case.place for case in every if case not in group}
    whole = {case: case.place for case in every}
    assert left(every, [], "cpu") == whole
    # A reason is an outcome, no time left is none.
    run = a_run_with(load, group[1:], group[:1])
    assert left(every, [run], "cpu") == rest
    run["absent"][0]["reason"] = load("provider").NOT_REACHED
    assert left(every, [run], "cpu") == whole
    # Of two runs, of other packages, of another device, of other sources.
    assert left(every, [a_run_with(load, group[1:]), a_run_with(load, group[:1])], "cpu") == whole
    versions = {**run["versions"], "torch": "1.0"}
    hashes = {**run["source_hash"], every[0].shape.path: "0" * 64}
    for changed in ({"versions": versions}, {"device": "another"}, {"source_hash": hashes}):
        assert left(every, [a_run_with(load, group, **changed)], "cpu") == whole


def test_what_only_lacks_late_cases_is_measured_with_them(load: Load) -> None:
    """As late as they are, so that what is not there at all comes first; in one turn."""
    left, plan = load("resume").left, load("plan")
    cases = [case for case in plan.cases("cuda", "linear") if case.shape == plan.over_vocabularies("cuda", "linear")[0]]
    early, late = [[case for case in cases if case.place == place] for place in (1, 3)]
    assert early
    assert late
    assert left(cases, [a_run_with(load, early, kind="cpu")], "cpu") == dict.fromkeys(cases, 3)
    # A turn that was cut is measured in its place.
    assert left(cases, [a_run_with(load, early[1:])], "cpu") == {case: case.place for case in cases}
    assert left(cases, [a_run_with(load, early), a_run_with(load, late)], "cpu") == dict.fromkeys(cases, 3)


def test_no_time_left_takes_no_reason_away(load: Load) -> None:
    """A case that was absent for good in an older run is no open one in the next but one."""
    results, case = load("results"), next(load("plan").cases("cpu", "logits"))
    older = a_run_with(load, [case], [case._replace(which="forward")])
    newer = a_run_with(load, [], [case._replace(which="forward")])
    newer["absent"][0]["reason"] = load("provider").NOT_REACHED
    assert results.merged([older], newer)[0] == {**older, "host_us": {}, "ce_share": {}}


def test_numbers_beside_the_cases_stay_until_they_are_measured_again(load: Load) -> None:
    """Also of a run that was cut off before its first case."""
    results = load("results")
    first, second = ({"cases": [], "absent": [], "host_us": host} for host in ({"a": 1.0, "b": 2.0}, {"b": 3.0}))
    runs = results.merged([first], second)
    assert [run["host_us"] for run in runs] == [{"a": 1.0}, {"b": 3.0}]
    assert len(results.merged([second], {**first, "host_us": {"b": 1.0}})) == 1


def test_host_times_are_those_of_the_commit(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    has, results = load("resume").has_host_time, load("results")
    run = {**results.new_run("cpu", 1e10), "host_us": {"logits both eager": 1.0}}
    assert has("logits both eager", [run], "cpu")
    assert not has("logits both compiled", [run], "cpu")
    assert not has("logits both eager", [{**run, "commit": "another"}], "cpu")
    assert not has("logits both eager", [{**run, "source_hash": {**run["source_hash"], "linear": "0"}}], "cpu")


def test_a_share_of_the_kernel_is_that_of_the_sources(load: Load) -> None:
    has, results, plan = load("resume").has_ce_share, load("results"), load("plan")
    one, other = plan.summary("cpu", "linear")[:2]
    run = {**results.new_run("cpu", 1e10), "ce_share": {str(one): 0.1}}
    assert has(one, [run], "cpu")
    assert not has(other, [run], "cpu")
    assert not has(one, [{**run, "source_hash": {**run["source_hash"], "linear": "0"}}], "cpu")


def test_benchmarks_run_in_the_order_of_the_plan_without_what_is_there(load: Load, tmp_path: Path) -> None:
    """Host times first, but for those that compile; what was chosen with -k is what is compared."""
    results, plan = load("results"), load("plan")
    main = plan.summary("cpu", "logits")[0]
    chosen = [case for case in plan.cases("cpu", "logits") if case.provider.name == "mtp_ce" and case.shape == main]
    assert {case.which for case in chosen} == {*plan.PASSES["logits"]}
    results.write(results.results_path("cpu", tmp_path), [a_run_with(load, chosen)])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks", "--collect-only", "-q"]

    def collected(*options: str) -> list[str]:
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]

    names = collected(f"--results={tmp_path}", "--resume", "-k", "mtp_ce- or host_time or mtp_ce]")
    assert not any(str(case) in name for case in chosen for name in names)
    tests = [name.partition("[")[0] for name in names]
    assert all("eager" in name for name in names[:4])
    assert tests[:4] == ["test_host_time"] * 4
    assert all("compiled" in name for name in names[-4:])
    assert tests[-4:] == ["test_host_time"] * 4
    # Places 0 and 1 of both losses, then place 2 of all.
    first = tests.index("test_token_ce")
    assert [name for name, _ in groupby(tests[4:first])] == ["test_linear", "test_logits"] * 3
    assert {*tests[first:-4]} == {"test_token_ce"}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_plan_covers_models_heads_and_providers(load: Load, kind: str) -> None:
    """Every path, at the vocabularies of five models and at four horizons; what matters most comes first."""
    plan, providers = load("plan"), load("providers")
    for path in PATHS:
        cases = [*plan.cases(kind, path)]
        assert len({str(case) for case in cases}) == len(cases)
        swept = {case.shape for case in cases if case.place > 0}
        assert {32000, 50257, 128256, 152064, 256000} <= {shape.V for shape in swept}
        assert {1, 2, 4, 8} <= {shape.H for shape in swept}
        assert {shape.softcap for shape in swept if shape.V == 256000} == {30.0}
        assert {case.provider for case in cases} == set(providers.PROVIDERS[path])
        # A ceiling is measured before what is held against it.
        assert path == "logits" or cases[0].provider.ceiling
    ours = {(c.shape.V, c.which) for c in plan.cases(kind, "logits") if c.provider.name == "mtp_ce" and c.shape.H == 4}
    apart = {V for V, which in ours if {(V, "forward"), (V, "backward")} <= ours}
    # Each kernel has its share of the ceiling at every vocabulary, aligned or not.
    assert apart >= ({32000, 50257, 50304, 128256, 151936, 256000, 262144} if kind == "cuda" else {32000})
    main = next(load("plan").cases(kind, "linear")).shape
    wanted = (2048, 512, 32000, "fp32") if kind == "cpu" else (8192, 4096, 151936, "bf16")
    assert (main.rows, main.D, main.V, main.dtype) == wanted


def test_rounds_are_timed_in_turns(load: Load) -> None:
    """So that a burst of somebody else's load meets all providers; and a timer replays what was measured."""
    rounds = load("rounds")
    order: list[str] = []
    seconds = rounds.in_turns({name: (tuple, lambda name=name: order.append(name)) for name in "abc"})
    assert order == list("abc") * (len(order) // 3)
    assert len(order) == 3 * rounds.MOST
    assert {name: len(durations) for name, durations in seconds.items()} == dict.fromkeys("abc", rounds.MOST)

    def breaks() -> None:
        raise MemoryError

    seconds = rounds.in_turns({"a": (tuple, lambda: None), "b": (tuple, breaks)})
    assert len(seconds["a"]) == rounds.MOST
    assert isinstance(seconds["b"], MemoryError)

    rounds.replay([0.25, 0.5])
    assert [-(rounds.recorded() - rounds.recorded()) for _ in range(2)] == [0.25, 0.5]


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


def test_memory_is_measured_above_the_inputs(load: Load) -> None:
    """In a fresh process: mtp_ce needs the gradient and little more, the eager loop several times as much."""
    memory, shapes = load("memory"), load("shapes")
    shape = shapes.Shape("logits", "Llama-2 7B", 32, 4, "fp32", 0)
    ours, loop = (memory.measure_cpu(shape, name) for name in ("mtp_ce", "eager_loop"))
    assert ours.forward < shape.gradient_bytes
    assert shape.gradient_bytes <= ours.both < 2 * shape.gradient_bytes < loop.both
    assert ours.of("backward") == ours.both


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_hash_of_a_path_follows_the_sources_that_are_timed(load: Load, tmp_path: Path, kind: str) -> None:
    results = load("results")
    for folder in ("kernels", "mtp_ce"):
        (tmp_path / folder).mkdir()
        for path in (ROOT / folder).glob("*.py"):
            shutil.copy(path, tmp_path / folder)

    def hashes() -> dict[str, str]:
        return {path: results.source_hash(kind, path, tmp_path) for path in PATHS}

    run = {"kind": kind, "source_hash": {path: results.source_hash(kind, path) for path in PATHS}}
    first = hashes()
    assert first == run["source_hash"]
    (tmp_path / "mtp_ce" / "loss.py").write_text("")
    assert hashes() == first
    (tmp_path / "mtp_ce" / "slabs.py").write_text("")
    assert {path for path in PATHS if results.is_stale(run, path, tmp_path)} == {"linear", "token_ce"}
    shared = tmp_path / {"cpu": "mtp_ce/ops/cpu.py", "cuda": "kernels/rows.py"}[kind]
    shared.write_text("")
    assert all(results.is_stale(run, path, tmp_path) for path in PATHS)


def test_every_source_of_a_path_exists(load: Load) -> None:
    for by_path in load("results").SOURCES.values():
        for patterns in by_path.values():
            assert all([*ROOT.glob(pattern)] for pattern in patterns), patterns


def test_a_results_file_says_what_was_timed_and_not_where(load: Load, tmp_path: Path) -> None:
    results = load("results")
    path = tmp_path / "results" / "cpu-2core.json"
    session = load("session").Session(results.new_run("cpu", 1e10), path)
    case = next(load("plan").cases("cpu", "linear"))
    time = results.timing([0.3, 0.1, 0.2], 0.07)
    session.add("cases", "mtp_ce", "both", case.shape, **time, peak_bytes=1, errors={})
    session.add("absent", "liger", "both", case.shape, reason="needs a GPU")

    (run,) = results.read(path)
    assert all(len(run["source_hash"][path]) == 64 for path in PATHS)
    assert {"python", "torch", "triton", "liger-kernel", "cut-cross-entropy"} <= set(run["versions"])
    (entry,) = run["cases"]
    assert entry["shape"] == {
        "path": "linear", "model": "Llama-2 7B", "B": 1, "S": 512, "H": 4, "V": 32000, "D": 512, "dtype": "fp32",
        "prompt": 0.0, "softcap": None, "rows": 2048, "live_rows": 2038, "logits_bytes": 2048 * 32000 * 4,
        "gradient_bytes": (2048 + 32000) * 512 * 4,
    }  # fmt: skip
    assert (entry["p20_ms"], entry["p50_ms"], entry["p80_ms"]) == (140.0, 200.0, 260.0)
    assert entry["share_of_ceiling"] == 0.5
    assert run["absent"][0]["reason"] == "needs a GPU"
    for secret in (socket.gethostname(), str(ROOT), str(Path.home()) + os.sep):
        assert secret not in path.read_text()


def test_a_new_run_takes_the_place_of_the_cases_it_measured(load: Load) -> None:
    """What it did not measure stays, with the versions and the commit of its own run."""
    results = load("results")

    def a_run(commit: str, *passes: str) -> dict[str, Any]:
        cases = [{"provider": "mtp_ce", "pass": which, "shape": {"V": 1}} for which in passes]
        return {"commit": commit, "cases": cases, "absent": []}

    first, second, third = a_run("one", "forward", "both"), a_run("two", "both"), a_run("three", "forward", "both")
    # An absence says nothing about a time that was measured when the provider was there.
    second["absent"].append({"provider": "mtp_ce", "pass": "forward", "shape": {"V": 1}, "reason": "?"})
    runs = results.merged([first], second)
    assert [(run["commit"], [case["pass"] for case in run["cases"]]) for run in runs] == [
        ("one", ["forward"]),
        ("two", ["both"]),
    ]
    assert [run["commit"] for run in results.merged(runs, third)] == ["three"]


def test_a_file_of_another_format_holds_no_results(load: Load, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"runs": [{"cases": [{"provider": "mtp_ce"}]}]}')
    assert load("results").read(tmp_path / "old.json") == []


def run_suite(*parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SUITE), *parts], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A stand-in for python that notes how it was called: tests fail, benchmarks hang, the training step is absent."""
    path = tmp_path / "python"
    path.write_text(
        f"""#!/bin/bash
echo "$PYTHONPATH ${{*//[[:space:]]/ }}" >>{tmp_path}/calls
[ -n "${{TRITON_INTERPRET:-}}" ] && echo interpreted && exit 1
case "$*" in
    "-c import xdist") exit 1 ;;
    -c*) echo this-device.json ;;
    *"-k (gpu or"*) echo "E   first"; for i in {{1..400}}; do echo "E  $i $(printf 'x%.0s' {{1..300}})"; done
        for i in {{1..500}}; do
            echo "FAILED tests/test_docs.py::test_$((i / 10))[$i-$(printf 'y%.0s' {{1..80}})] - E"; done
        echo "500 failed in 2 s"; exit 1 ;;
    *"-k not gpu"*) echo "[gw3] [ 13%] FAILED tests/test_house.py::test_y "; exec sleep 60 ;;
    *training_step*) echo "absent: no transformers" ;;
    *benchmarks.sweep*) echo swept ;;
    *benchmarks.targets*) for i in {{1..90}}; do echo "target $i $(printf 'z%.0s' {{1..300}})"; done ;;
    *benchmarks.table*) echo "the table" ;;
    *) echo "3 passed" ;;
esac
"""
    )
    path.chmod(0o755)
    return path


def test_the_gpu_suite_says_that_it_has_no_gpu() -> None:
    done = run_suite(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3
    assert done.stdout.splitlines() == ["gpu_suite: no GPU that torch can use; nothing was run."]


def test_the_gpu_suite_says_the_most_in_what_is_read_of_it(python: Path, tmp_path: Path) -> None:
    """What fails by name, what it said, the last line of every part, the targets; the logs have all of it."""
    logs, folder = tmp_path / "logs", tmp_path / "results"
    done = run_suite(
        PYTHON=str(python), LOGS=str(logs), RESULTS=str(folder), TEST_SECONDS="1", TRITON_INTERPRET="1", PYTHONPATH="/p"
    )
    assert done.returncode == 1
    assert len(done.stdout) + len(done.stderr) < 10_000
    lines = done.stdout.splitlines()
    heads = {name: lines.index(line) for line in lines if line.startswith("==") for name in [line.split()[1]]}
    assert [*heads] == ["device", "tests", "benchmarks", "step", "targets"]
    device = lines[heads["device"] + 1 : heads["tests"]]
    assert re.fullmatch(r"FAILED tests/test_docs.py::test_0\[1-y+\] and 8 more of it", device[0])
    assert re.fullmatch(r"FAILED tests/test_docs.py::test_11\[110-y+\] and 9 more of it", device[11])
    assert device[12:14] == ["failed: 500", "E   first"]
    assert max(map(len, device)) == 200
    assert device[-1] == "500 failed in 2 s"
    # It was killed before it could sum up.
    assert lines[heads["tests"] + 1 : heads["benchmarks"]][-1] == "tests ran out of its 1 s"
    assert lines[heads["benchmarks"] + 1] == "3 passed"
    assert lines[heads["step"] + 1] == "absent: no transformers"
    assert lines[heads["targets"] + 1].startswith("target 1 z")
    assert {path.name for path in logs.iterdir()} >= {f"{name}.log" for name in (*heads, "table")} - {"targets.log"}
    assert len((logs / "device.log").read_text()) > 100_000
    assert (logs / "table.log").read_text() == "the table\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    # What is installed elsewhere stays within reach, behind this tree.
    assert all(call.startswith(".:/p -") for call in calls)
    (benchmarks,) = [call for call in calls if "--benchmark-only" in call]
    assert f"--results={folder} --resume --time-limit 80" in benchmarks
    assert any(f"training_step --results {folder} --resume --time-limit 30" in call for call in calls)
    assert [call.split()[-1] for call in calls[-2:]] == [f"{folder}/this-device.json"] * 2
    for call in calls:
        if "tests/mtp_ce" in call:
            assert call.index("test_gpu.py") < call.index("test_weights.py") < call.index("test_random_cases.py")
            assert "tests/kernels/test_splits.py" in call
            assert "test_compiled" not in call


def test_the_gpu_suite_names_what_failed_before_a_part_was_killed(python: Path) -> None:
    done = run_suite("tests", PYTHON=str(python), TEST_SECONDS="1")
    assert done.stdout.splitlines()[1:3] == ["FAILED tests/test_house.py::test_y", "failed: 1"]


def test_the_gpu_suite_runs_the_parts_that_are_asked_for(python: Path, tmp_path: Path) -> None:
    """In its own order; without the targets where nothing was timed."""
    done = run_suite("sweep", "step", PYTHON=str(python), RESULTS="here", SWEEP_SECONDS="7")
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("== ")] == [
        "== step (at most 50 s)", "== sweep (at most 7 s)", "== targets",
    ]  # fmt: skip
    # A folder is where the caller stands.
    assert f"benchmarks.sweep --results {Path.cwd() / 'here'}\n" in (tmp_path / "calls").read_text()
    assert run_suite("sweep", PYTHON=str(python)).stdout.splitlines()[1:] == ["swept"]
    done = run_suite("step", "bench", PYTHON=str(python))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'gpu_suite: no part "bench"; expected device tests benchmarks step sweep.\n'


def test_the_device_and_the_tests_are_two_halves() -> None:
    """What one part leaves out, the other runs."""
    halves = re.findall(r'-k "(.*?) and not cpu"|-k "(not .*?) and not cpu"', SUITE.read_text())
    assert [one or other for one, other in halves] == ["(gpu or test_splits)", "not gpu and not test_splits"]


def test_the_gpu_suite_ends_within_nine_minutes() -> None:
    """Its limits together: the look for a GPU, four parts with what they have to end and to be killed, two tables."""
    text = SUITE.read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"\{(\w+)_SECONDS:=(\d+)}", text)}
    del limits["SWEEP"]
    endings = [int(seconds) for seconds in re.findall(r"_SECONDS:=\d+} \+ (\d+)", text)]
    others = [int(seconds) for seconds in re.findall(r"timeout (?:--kill-after=1 )?(\d+)", text)]
    (grace,) = map(int, re.findall(r"--signal=INT --kill-after=(\d+)", text))
    assert (len(limits), len(endings), len(others)) == (4, 2, 3)
    assert sum(limits.values()) + sum(endings) + len(limits) * grace + sum(others) <= 530
