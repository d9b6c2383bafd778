"""Every kernel as its launcher compiles it for a real GPU, on a machine without one.

The launchers run unchanged against a driver that only names a target; each launch compiles and stops there. Not in a
process that has TRITON_INTERPRET set: the interpreter and the compiler can't share one.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mtp_ce.kernels import backward, forward, forward_backward, mean, rows, scale, shards
from mtp_ce.kernels.results import RowResults, Rows
from mtp_ce.ops.logits import empty_gradient
from mtp_ce.options import LossInputs, LossOptions, VocabShard

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


class Launch(NamedTuple):
    """One launch that was asked for."""

    name: str
    grid: tuple[int, ...]
    options: dict[str, Any]  # the kernel's keywords: its constants, and num_warps
    kernel: Any  # what Triton has compiled

    @property
    def programs(self) -> int:
        """Programs of the grid."""
        count = 1
        for size in self.grid:
            count *= size
        return count

    @property
    def splits(self) -> int:
        """Programs that share a row: the second dimension of the grid."""
        return self.grid[1] if len(self.grid) > 1 else 1

    @property
    def strips(self) -> list[int]:
        """Strips of a tile, of each pass over the vocabulary: the online softmax, then the gradient."""
        passes = [getattr(self.options.get("SETTINGS"), name, None) for name in ("softmax", "gradient")]
        return [settings.STRIPS for settings in passes if settings is not None]

    @property
    def threads(self) -> int:
        """Threads of a program."""
        metadata = self.kernel.metadata
        return int(metadata.num_warps * metadata.target.warp_size)


@contextmanager
def compiling(target_name: str, multiprocessors: int = 1) -> Iterator[list[Launch]]:
    """Inside, launches compile for the target, run nothing, and are listed; grids are for so many multiprocessors."""
    target = GPUTarget(*TARGETS[target_name])

    class Named:
        """A driver that names a target and has no device."""

        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    launched: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        launched.append(Launch(self.__name__, tuple(grid), options, kernel))
        return kernel

    of_the_device = {"WARP_SIZE": target.warp_size, "processors": lambda device: multiprocessors}
    driver.set_active(Named())
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for module in (forward, backward, forward_backward, shards):
            own = {name: value for name, value in of_the_device.items() if hasattr(module, name)}
            patches.enter_context(mock.patch.multiple(module, **own))
        yield launched


PLAIN = {"softcap": None, "z_loss": 0.0, "label_smoothing": 0.0}
CAPPED = {"softcap": 30.0, "z_loss": 1e-4, "label_smoothing": 0.1}


def launch_logits(
    logits: torch.Tensor,  # [B, S, H, V]
    loss: dict[str, Any] = PLAIN,
    *,
    apart: bool = False,
    extra: bool = False,
    changing: bool = False,
) -> None:
    """Forward, mean and backward, of the H heads `apart` where wanted; `extra` asks for the statistics too.

    `changing` reads the numbers of the loss from a tensor.
    """
    B, S = logits.shape[:2]
    d_logits = empty_gradient(logits)
    heads, d_heads = (list(x.unbind(2)) if apart else [x] for x in (logits, d_logits))
    tokens, options = torch.zeros(B, S, dtype=torch.int64), LossOptions(weight_alignment="target", **loss)
    terms = torch.ones(4, dtype=torch.float64) if changing else None
    inputs = LossInputs(tokens, torch.ones(B, S), document_ids=tokens, terms=terms)
    results = forward.launch_forward(heads, inputs, options, with_top1=extra, with_d_weights=extra)
    _, factor = mean.launch_mean(results.out, results.valid, None, options, terms)
    backward.launch_backward(results.out, heads, d_heads, inputs, options, results.row_max, results.log_sum, factor)


def launch_chunk(
    R: int,
    V: int,
    dtype: torch.dtype,
    loss: dict[str, Any] = PLAIN,
    *,
    extra: bool = False,
    changing: bool = False,
    ranks: int = 1,
) -> None:
    """Loss and gradient of a chunk of R rows, padded to whole vectors as the linear path pads them.

    With several ranks the V entries are those of the second.
    """
    unit = 16 // dtype.itemsize
    logits_chunk = torch.empty(R, -(-V // unit) * unit, dtype=dtype)[:, :V]
    row = torch.zeros(R)
    results = RowResults(row, row, row, row.int() if extra else None)
    terms = torch.ones(4, dtype=torch.float64) if changing else None
    of_row = Rows(row.int(), row, row.bool())
    if ranks == 1:
        forward_backward.launch_forward_backward(
            logits_chunk, of_row, results, LossOptions(**loss), gradient=True, terms=terms
        )
        return
    shards.launch_shard(
        logits_chunk, of_row, results, LossOptions(**loss), gradient=True, terms=terms,
        shard=VocabShard(ranks * V, V, ranks), gather=lambda partials, **_: partials.new_zeros(7, R, ranks),
    )  # fmt: skip


def launch_rows() -> None:
    """The rule of the linear path's rows, with everything that it can be given: 5 positions of 8 tokens."""
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    inputs = LossInputs(tokens, torch.ones(2, 8), torch.ones(4), torch.zeros(2, dtype=torch.int64), tokens)
    options = LossOptions(weight_alignment="target", left_halo=2)
    rows.launch_rows(inputs, options, (2, 5, 4), V=32000, by_head=True, with_d_weights=True)


def launch_scale(V: int, D: int, dtype: torch.dtype) -> None:
    """The gradient of unembed times the upstream gradient."""
    scale.launch_scale(torch.empty(V, D, dtype=dtype), torch.ones(()))
