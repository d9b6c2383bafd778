"""How one case is measured: checked, timed, recorded."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import products, results, rounds
from benchmarks.clock import LostDeviceError
from benchmarks.plan import Case
from benchmarks.provider import AbsentError
from benchmarks.session import Session
from benchmarks.shapes import Shape
from mtp_ce.kernels import backward, forward


def bytes_moved(which: str, shape: Shape) -> int:
    """Bytes that a loss of logits must move, by the kernels' own account."""
    itemsize = shape.torch_dtype.itemsize
    down = forward.traffic(shape.live_rows, shape.B * shape.S, shape.H, shape.V, itemsize)
    back = backward.traffic(shape.live_rows, shape.rows, shape.V, itemsize)
    return sum({"forward": down, "backward": back, "both": down + back}[which])


def measure(benchmark: BenchmarkFixture, session: Session, case: Case) -> None:
    """The body of every benchmark."""
    shape, which, provider, _ = case
    benchmark.group = f"{shape.path} {shape} {which}"
    try:
        problem = session.problem(shape)
        seconds = [0.0] if benchmark.disabled else session.seconds(case, problem)
        errors, peak = session.qualify(provider, problem)
    except AbsentError as absent:
        session.add("absent", provider.name, which, shape, reason=str(absent))
        pytest.skip(str(absent))
    except LostDeviceError as lost:
        session.add("absent", lost.provider, which, shape, reason=str(lost))
        pytest.exit(str(lost), returncode=pytest.ExitCode.TESTS_FAILED)

    benchmark.extra_info["peak_mib_above_inputs"] = round(peak().of(which) / 2**20, 1)
    rounds.replay(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds))
    if benchmark.disabled:
        return
    if shape.path == "logits":
        work = {"bytes": bytes_moved(which, shape)}
        ceiling = work["bytes"] / session.run["copy_bytes_per_s"]
    else:
        work = {"operations": products.operations(shape)}
        ceiling = session.ceiling(shape)
    time = results.timing(seconds, ceiling)
    benchmark.extra_info["share_of_ceiling"] = time["share_of_ceiling"]
    session.add(
        "cases", provider.name, which, shape, **time, **work,
        others_cpu=problem.others[which, case.place], peak_bytes=peak().of(which),
        errors={name: error._asdict() for name, error in errors.items()},
    )  # fmt: skip
