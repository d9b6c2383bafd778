"""Every kernel, compiled for real GPUs on a machine without one: registers, spills and the width of its loads.

Each launch compiles and stops there (benchmarks/compiled.py), in a process of its own, because the interpreter and the
compiler can't share one.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# V for each thread count of tiles.py; 50257 is odd, so that every row stands differently against 16 bytes.
VOCABULARIES = [1000, 4100, 32000, 50257, 151936]
# Entries before and after the vocabulary in rows of logits that are slices: padded to whole vectors, or cut anywhere.
SLICES = {"padded": (0, 47), "without first entries": (3, 0), "without last entries": (0, 5)}


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    """What each compiled kernel uses, by (kernel, V, itemsize, options) on one target."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # benchmarks/ is not installed.
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "error:TRITON_DEFAULT_FP_FUSION", __file__, request.param]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_every_launch_states_the_compiler_defaults_it_relies_on():
    """Triton 3.9 warns where `enable_fp_fusion` is left open, and 3.10 turns it off: a third more instructions."""
    launches = [
        node
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert len(launches) == 9
    for launch in launches:
        stated = {keyword.arg: ast.unparse(keyword.value) for keyword in launch.keywords}
        assert stated.get("enable_fp_fusion") == "True", ast.unparse(launch)
        assert "num_warps" in stated, ast.unparse(launch)


def test_no_kernel_spills_or_uses_a_stack(compiled):
    spilling = [kernel for kernel in compiled if kernel["stack"] or kernel["spills"]]
    assert not spilling


def test_every_hot_load_and_store_is_128_bits_wide_at_any_row_alignment(compiled):
    """Left over are scalars and the edges of a misaligned row: one narrow access a head, whatever V is."""
    for kernel in compiled:
        if kernel["strips"] is None or kernel["layout"] == "strided":
            continue
        wide = kernel["strips"] * kernel["H"]
        again = kernel["gradient_strips"] or 0
        # AMD's compiler peels the first pass of a loop that computes the base of the mean there.
        copies = (1, 2) if kernel["target"] == "gfx942" and "capped" in kernel["layout"] else (1,)
        # It also reads two of the numbers that change between calls, neighbours of 8 bytes, at once.
        terms = (0, 1) if kernel["target"] == "gfx942" and "changing" in kernel["layout"] else (0,)
        loads = [copy * (wide + again) + term for copy in copies for term in terms]
        assert kernel["wide_loads"] in loads, kernel
        if kernel["name"] not in ("forward_kernel", "shard_partials_kernel"):
            # Gradients, and zeros where the head is dead.
            assert kernel["wide_stores"] == 2 * (again or wide), kernel


def test_rows_are_compiled_whole_and_shared(compiled):
    """One program a position, and several with the kernel that combines them."""
    names = {(kernel["name"], kernel["shared"]) for kernel in compiled}
    assert {(name, shared) for name in ("forward_kernel", "backward_kernel") for shared in (False, True)} <= names
    assert {("combine_kernel", True), ("forward_backward_kernel", False), ("rows_kernel", False)} <= names
    assert {("shard_partials_kernel", False), ("shard_gradient_kernel", False)} <= names
    (scaled,) = (kernel for kernel in compiled if kernel["name"] == "scale_kernel")
    # 4096 elements of 2 bytes for 8 warps, of 64 threads on AMD.
    assert scaled["wide_loads"] == scaled["wide_stores"] == (1 if scaled["target"] == "gfx942" else 2), scaled


def test_no_barrier_stands_between_tiles(compiled):
    """Threads meet once a head; the label's search and the statistics add their own."""
    for kernel in compiled:
        if kernel["name"] == "backward_kernel":
            assert kernel["barriers"] == 0, kernel


def test_registers_leave_room_for_two_blocks_of_256_threads(compiled):
    for kernel in compiled:
        assert kernel["registers"] <= (256 if kernel["target"] == "gfx942" else 128), kernel


def main(target_name: str) -> None:
    """Compile all cases for one target and print what they use as one line of JSON."""
    import torch

    from benchmarks import compiled

    large = (32000, 50257, 151936)
    cases = [(V, torch.bfloat16, 2, "apart") for V in VOCABULARIES]
    cases += [(V, torch.bfloat16, 1, layout) for V in large for layout in ("plain", "capped", "statistics")]
    cases += [(V, torch.bfloat16, H, layout) for V in large for H, layout in ((4, "plain"), (2, "shared"))]
    cases += [(V, torch.bfloat16, 1, "shared capped") for V in large]
    cases += [(V, torch.float32, H, layout) for V in large for H, layout in ((2, "plain"), (1, "capped"))]
    cases += [(32000, torch.bfloat16, 1, "strided"), (151936, torch.bfloat16, 1, "capped changing")]
    # What the random cases draw beside these has the strides of one of them against 16 bytes.
    cases += [(50257, torch.bfloat16, 2, layout) for layout in SLICES]
    cases += [(32000, torch.bfloat16, 4, "per token")]
    report = []
    for V, dtype, H, layout in cases:
        logits = torch.empty(1, 2, H, V, dtype=dtype)
        if layout in SLICES:
            before, after = SLICES[layout]
            logits = torch.empty(1, 2, H, before + V + after, dtype=dtype)[..., before : before + V]
        if layout == "strided":
            logits = torch.empty(1, V, 2, H, dtype=dtype).permute(0, 2, 3, 1)
        loss = compiled.CAPPED if "capped" in layout else compiled.PLAIN
        if layout == "per token":
            loss = {**loss, "head_reduction": "target"}
        extra = "capped" in layout or layout == "statistics"
        # Nobody shares a row on no multiprocessor, and two positions are too few for 132.
        how = {"extra": extra, "changing": "changing" in layout}
        with compiled.compiling(target_name, 132 if "shared" in layout else 0) as launched:
            compiled.launch_logits(logits, loss, apart=layout == "apart", **how)
            if H == 1 and layout in ("plain", "capped", "statistics", "capped changing"):
                compiled.launch_chunk(2, V, dtype, loss, **how)
                if V == 32000:
                    compiled.launch_chunk(2, V, dtype, loss, **how, ranks=8)
            if not report:
                compiled.launch_rows()
                compiled.launch_scale(1000, 64, torch.bfloat16)
        for launch in launched:
            used = _amd(launch.kernel) if target_name == "gfx942" else _nvidia(launch.kernel)
            case = {"target": target_name, "name": launch.name, "V": V, "dtype": str(dtype), "H": H, "layout": layout}
            strips, again = [*launch.strips, None, None][:2]
            report.append({**case, "strips": strips, "gradient_strips": again, "shared": "shared" in layout, **used})
    print(json.dumps(report))


def _nvidia(kernel) -> dict[str, int]:
    from benchmarks import sass

    used = sass.resources(kernel)
    access = Counter(re.findall(r"(?:ld|st)\.global\S*", kernel.asm["ptx"]))
    return {
        **{name: used[name] for name in ("registers", "stack", "spills")},
        "wide_loads": sum(n for kind, n in access.items() if kind.startswith("ld") and ".v4.b32" in kind),
        "wide_stores": sum(n for kind, n in access.items() if kind.startswith("st") and ".v4.b32" in kind),
        "barriers": kernel.asm["ptx"].count("bar.sync"),
    }


def _amd(kernel) -> dict[str, int]:
    text = kernel.asm["amdgcn"]
    access = Counter(re.findall(r"(?:global|buffer)_(?:load|store)_dwordx4", text))
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        "stack": int(re.search(r"ScratchSize: (\d+)", text)[1]),
        # Scalar registers spill into lanes of vector registers, not to memory: those show in vgpr_count.
        "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]),
        "wide_loads": sum(n for kind, n in access.items() if "load" in kind),
        "wide_stores": sum(n for kind, n in access.items() if "store" in kind),
        "barriers": text.count("s_barrier"),
    }


if __name__ == "__main__":
    main(sys.argv[1])
