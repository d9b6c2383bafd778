"""Every kernel, compiled for real GPUs on a machine without one: registers, spills and the width of its loads.

The launchers run unchanged against a driver that only names a target; each launch compiles and stops there. That
happens in a process of its own, because the interpreter and the compiler can't share one.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# V for each thread count of tiles.py; 50257 is odd, so that every row stands differently against 16 bytes.
VOCABULARIES = [1000, 4100, 32000, 50257, 151936]


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    """What each compiled kernel uses, by (kernel, V, itemsize, options) on one target."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, __file__, request.param], env=env, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_no_kernel_spills_or_uses_a_stack(compiled):
    spilling = [kernel for kernel in compiled if kernel["stack"] or kernel["spills"]]
    assert not spilling


def test_every_hot_load_and_store_is_128_bits_wide_at_any_row_alignment(compiled):
    """Left over are scalars and the edges of a misaligned row: one narrow access a head, whatever V is."""
    for kernel in compiled:
        if kernel["name"] == "mean_kernel" or kernel["layout"] == "strided":
            continue
        wide = kernel["strips"] * kernel["H"]
        again = kernel["gradient_strips"] or 0
        assert kernel["wide_loads"] == wide + again, kernel
        if kernel["name"] != "forward_kernel":
            # Gradients, and zeros where the head is dead.
            assert kernel["wide_stores"] == 2 * (again or wide), kernel


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
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from mtp_ce.kernels import backward, forward, forward_backward

    target = GPUTarget(*TARGETS[target_name])

    class Named:
        """A driver that names a target and has no device."""

        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    launched = []
    run = JITFunction.run

    def compile_only(self, *args, **options):
        options["warmup"] = True
        kernel = run(self, *args, **options)
        launched.append((self.__name__, options.get("STRIPS"), options.get("GRADIENT_STRIPS"), kernel))
        return kernel

    driver.set_active(Named())
    JITFunction.run = compile_only
    forward.WARP_SIZE = backward.WARP_SIZE = forward_backward.WARP_SIZE = target.warp_size

    plain = {"softcap": None, "z_loss": 0.0, "label_smoothing": 0.0}
    capped = {"softcap": 30.0, "z_loss": 1e-4, "label_smoothing": 0.1}
    cases = [(V, torch.bfloat16, 4, "plain") for V in VOCABULARIES]
    cases += [(V, torch.bfloat16, 1, "statistics") for V in (32000, 50257, 151936)]
    cases += [(V, torch.bfloat16, 1, layout) for V in (32000, 50257, 151936) for layout in ("plain", "capped")]
    cases += [
        (V, torch.float32, H, layout) for V in (32000, 50257, 151936) for H, layout in ((4, "plain"), (1, "capped"))
    ]
    cases += [(32000, torch.bfloat16, 1, "strided")]
    report = []
    for V, dtype, H, layout in cases:
        logits = torch.empty(1, 2, H, V, dtype=dtype)
        if layout == "strided":
            logits = torch.empty(1, V, 2, H, dtype=dtype).permute(0, 2, 3, 1)
        heads, d_heads = list(logits.unbind(2)), list(torch.empty_like(logits).unbind(2))
        rule = {"shift": 1, "over_horizon": False, "target_weights": True, "ignore_index": -100}
        rule |= capped if layout == "capped" else plain
        tokens = torch.zeros(1, 2, dtype=torch.int64)
        given = (tokens, torch.ones(1, 2), None, None, tokens)
        extra = layout in ("capped", "statistics")
        out, _, row_max, log_sum, live, _, _ = forward.launch_forward(
            heads, *given, with_top1=extra, with_shares=extra, **rule
        )
        _, factor = forward.launch_mean(out, live, None, scale=1.0, count=True)
        backward.launch_backward(out, heads, d_heads, *given, row_max, log_sum, factor, **rule)
        if H == 1 and layout != "strided":
            # The linear path pads the rows of its slab to whole vectors.
            unit = 16 // logits.element_size()
            slab = torch.empty(2, -(-V // unit) * unit, dtype=dtype)[:, :V]
            row = torch.zeros(2)
            forward_backward.launch_forward_backward(
                slab, row.int(), row, row.bool(), row, row, row, row.int() if extra else None,
                softcap=rule["softcap"], z_loss=rule["z_loss"], label_smoothing=rule["label_smoothing"], gradient=True,
            )  # fmt: skip
        for name, strips, gradient_strips, kernel in launched:
            case = {"target": target_name, "name": name, "V": V, "dtype": str(dtype), "H": H, "layout": layout}
            used = _amd(kernel) if target.backend == "hip" else _nvidia(kernel)
            report.append({**case, "strips": strips, "gradient_strips": gradient_strips, **used})
        launched.clear()
    print(json.dumps(report))


def _nvidia(kernel) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups()
    access = Counter(re.findall(r"(?:ld|st)\.global\S*", kernel.asm["ptx"]))
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills": int(local),
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
