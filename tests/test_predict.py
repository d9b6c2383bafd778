"""What is predicted of the kernels: the arithmetic, the loops it is counted in, and the age of the log's table."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
Load = Callable[[str], ModuleType]
# Rows of 1000 whole vectors: several tiles, the last of them not full.
V, H = 8000, 2
LOOP = """
    .text.kernel:
        /*0000*/   IMAD.U32 R0, RZ, RZ, UR13 ;
    .L_x_0:
        /*0010*/   @!P0 LDG.E.128 R4, desc[UR8][R2.64] ;
        /*0020*/   @!P1 LDG.E.128 R8, desc[UR8][R2.64+0x1000] ;
        /*0030*/   MUFU.EX2 R4, R4 ;
        /*0040*/   @P0 BRA `(.L_x_1) ;
        /*0050*/   FADD R4, R4, R5 ;
        /*0060*/   SHFL.BFLY PT, R4, R5, 0x10, 0x1f ;
    .L_x_1:
        /*0070*/   FFMA R6, R4, R5, R6 ;
        /*0080*/   @P1 BRA `(.L_x_0) ;
        /*0090*/   EXIT ;
    .L_x_2:
        /*00a0*/   BRA `(.L_x_2);
        /*00b0*/   NOP;
"""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A module of benchmarks/, which is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(scope="module")
def predicted() -> dict[str, dict[str, Any]]:
    """Predictions for a small problem, by kernel and case, compiled for sm_90 in a process without the interpreter."""
    program = f"""
import json
from benchmarks.predict import Problem, predictions
found = {{}}
for one in predictions("sm_90", [Problem(100, {H}, {V}), Problem(100, 1, {V}, chunk=True)]):
    loops = [[loop.wide("LDG"), loop.wide("STG"), loop.elements_per_thread(2)] for loop in one.row_loops]
    found[one.launch.name + one.case] = {{
        "loops": loops, "mufu": one.per_element("mufu"), "instructions": one.per_element(), "grid": one.launch.programs,
        "threads": one.launch.threads, "passes": [one.passes(loop) for loop in one.row_loops], "bytes": one.bytes,
        "strips": [*one.launch.strips, None][:2], "blocks": one.blocks,
        "splits": one.launch.splits,
        "best": one.best(), "worst": one.worst(), "bounds": one.bounds(),
    }}
print(json.dumps(found))
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 256, 0, 8),  # all 2048 threads
        (33, 256, 0, 6),  # 40 a thread
        (64, 256, 1056, 4),
        (72, 256, 1056, 3),
        (100, 256, 1056, 2),
        (255, 256, 0, 1),
        (64, 1024, 1056, 1),
        (65, 1024, 0, 0),
        (16, 32, 0, 32),  # blocks themselves
        (32, 128, 100 * 1024, 2),
    ],
)
def test_blocks_of_an_h100_are_what_its_registers_threads_and_memory_allow(
    load: Load, registers: int, threads: int, shared: int, blocks: int
) -> None:
    """256 registers at a time to a warp, four schedulers that share nothing, 1 KB of shared memory to the driver."""
    predict = load("predict")
    assert predict.blocks_per_sm(predict.GPUS["sm_90"], registers, threads, shared) == blocks


def test_a_loop_is_counted_along_the_way_that_most_passes_take(load: Load) -> None:
    """Without what a branch goes around, before the loop or after it; an endless loop of nothing is none."""
    (loop,) = load("sass").loops(LOOP)
    assert [line.opcode for line in loop.instructions] == [
        "LDG.E.128", "LDG.E.128", "MUFU.EX2", "BRA", "FFMA", "BRA",
    ]  # fmt: skip
    assert loop.elements_per_thread(2) == 16
    assert loop.elements_per_thread(4) == 8
    assert (loop.count("mufu"), loop.count("alu")) == (1, 0)


def test_a_loop_with_several_ways_back_is_one_loop(load: Load) -> None:
    text = LOOP.replace("FADD R4, R4, R5", "@P2 BRA `(.L_x_0)")
    (loop,) = load("sass").loops(text)
    # The shortest way back is the one over the first branch.
    assert len(loop.instructions) == 5
    assert loop.wide("LDG") == 2


def test_a_loop_that_loads_for_its_next_pass_does_not_wait(load: Load) -> None:
    """Read before the load, or after something else was written there, is not read of the load."""
    loops = load("sass").loops
    assert not loops(LOOP)[0].loads_ahead()
    assert not loops(LOOP.replace("MUFU.EX2 R4, R4", "FADD R6, R6, R11"))[0].loads_ahead()
    ahead = LOOP.replace("MUFU.EX2 R4, R4", "MUFU.EX2 R12, R12").replace("R6, R4, R5, R6", "R12, R13, R14, R12")
    assert loops(ahead)[0].loads_ahead()
    assert loops(ahead.replace("MUFU.EX2 R12, R12", "MOV R11, RZ").replace("R13", "R11"))[0].loads_ahead()


def test_the_loops_of_the_kernels_load_and_store_what_their_tiles_say(predicted: dict[str, dict[str, Any]]) -> None:
    """128-bit accesses: as many as strips; every element is exponentiated once in each pass."""
    for name, found in predicted.items():
        strips, gradient_strips = found["strips"]
        assert name.startswith("forward_backward") or found["grid"] == 100 * found["splits"]
        if name == "forward_kernel":
            assert found["loops"] == [[strips, 0, 8 * strips]]
        elif name == "backward_kernel":
            assert found["loops"] == [[strips, strips, 8 * strips]]
        else:
            again = gradient_strips
            assert found["loops"] == [[strips, 0, 8 * strips], [again, again, 8 * again]]
        assert len(found["loops"]) <= found["mufu"] < 1.1 * len(found["loops"])
        assert 5 * len(found["loops"]) < found["instructions"] < 20 * len(found["loops"])


def test_a_prediction_takes_grid_and_passes_from_the_launch(predicted: dict[str, dict[str, Any]]) -> None:
    """All programs together cover every row once in each pass; no case is faster than its bytes."""
    for name, found in predicted.items():
        rows = 100 if name.startswith("forward_backward") else 100 * H
        for passes, (_, _, elements) in zip(found["passes"], found["loops"], strict=True):
            visited = passes * found["grid"] * elements * found["threads"]
            assert rows * V <= visited < rows * (V + found["splits"] * elements * found["threads"])
        assert found["bounds"]["bytes"] == pytest.approx(found["bytes"] / 3.0e12)
        assert max(found["bounds"].values()) <= found["best"] <= found["worst"]
        assert 256 <= found["blocks"] * found["threads"] <= 2048


def test_a_second_visit_costs_its_bytes_only_where_they_come_from_memory(predicted: dict[str, dict[str, Any]]) -> None:
    from_l2 = predicted.get("forward_backward_kernelagain from L2")
    if from_l2 is None:
        pytest.skip("rows of this length are visited once")
    assert from_l2["bytes"] == 2 * 100 * V * 2
    assert predicted["forward_backward_kernelagain from memory"]["bytes"] == 3 * 100 * V * 2


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("version", ["3.9.0"])
def test_the_tables_of_the_log_are_of_these_kernels(load: Load, version: str, target: str) -> None:
    """`python -m benchmarks.predict --write` makes them, and takes minutes; until then they must say STALE."""
    page = (ROOT / "benchmarks" / "LOG.md").read_text(encoding="utf-8")
    name = f"triton-{version}-{target}"
    heading, section = (text.strip() for text in page.split(f"<!-- {name}:begin -->"))
    assert heading.splitlines()[-1].startswith(f"### Triton {version}, {target}")
    section, end, _ = section.partition(f"<!-- {name}:end -->")
    made_of = re.match(r"Kernels `(\w+)`, triton (\S+), (\w+)\.\n", section)
    digest = load("results").source_hash("cuda", "kernels")[:16]
    assert section.startswith("STALE") or (made_of and made_of.groups() == (digest, version, target))
    assert end
    if section.startswith("STALE"):
        return
    assert "nothing is measured" in section
    shipped = {"forward", "backward", "forward, statistics", "forward, softcap 30", "backward, softcap 30"}
    assert shipped <= set(re.findall(r"^\| ([^|]*?) \|", section, re.MULTILINE))
