"""The problems that are timed: one place for every shape, and the tensors of one.

CPU    1 x 512 x 4 x 32000 in fp32 and bf16 is the shape that the project's CPU figures are about. Besides it a
       vocabulary that is no multiple of a vector (50257), and a prompt: 40 % of the labels ignored, as in
       instruction tuning, so that rows are dead; both small.
GPU    8192 rows of bf16 at the vocabularies of Llama-2, GPT-2 (as it is, and padded), Llama-3, Qwen2.5 and Gemma, as
       four heads and as one; few rows of a wide vocabulary, which leave most of a GPU idle; and a prompt.

B is 1 everywhere: a slice of a head's rows then stays a view, so that no peer pays for a copy that we do not.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """One problem: logits [B, S, H, V] of a dtype, of which the first `prompt` of the labels are ignored."""

    B: int
    S: int
    H: int
    V: int
    dtype: str
    prompt: float = 0.0

    def __str__(self) -> str:
        prompt = f"-prompt{self.prompt:.0%}".rstrip("%") if self.prompt else ""
        return f"V{self.V}-H{self.H}-N{self.rows}-{self.dtype}{prompt}"

    @property
    def rows(self) -> int:
        """N: rows of V logits."""
        return self.B * self.S * self.H

    @property
    def live_rows(self) -> int:
        """Rows that have a target: head h reaches every label that is not ignored, from 1 + h on."""
        ignored = int(self.prompt * self.S)
        return self.B * sum(max(0, self.S - max(ignored, 1 + h)) for h in range(self.H))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the logits, and so of their gradient."""
        return self.rows * self.V * self.torch_dtype.itemsize

    def as_dict(self) -> dict[str, Any]:
        """For the results file."""
        return {**asdict(self), "rows": self.rows, "live_rows": self.live_rows}


CPU_SHAPES = (
    Shape(1, 512, 4, 32000, "fp32"),
    Shape(1, 512, 4, 32000, "bf16"),
    Shape(1, 64, 4, 50257, "bf16"),
    Shape(1, 128, 4, 32000, "fp32", prompt=0.4),
)

# In the order of what would be missed most: the suite may run out of its time.
GPU_SHAPES = (
    Shape(1, 2048, 4, 151936, "bf16"),
    Shape(1, 2048, 4, 32000, "bf16"),
    Shape(1, 2048, 4, 50257, "bf16"),
    Shape(1, 256, 1, 151936, "bf16"),
    Shape(1, 2048, 4, 262144, "bf16"),
    Shape(1, 8192, 1, 151936, "bf16"),
    Shape(1, 2048, 4, 32000, "bf16", prompt=0.4),
    Shape(1, 2048, 4, 128256, "bf16"),
    Shape(1, 2048, 4, 50304, "bf16"),
    Shape(1, 8192, 1, 32000, "bf16"),
    Shape(1, 64, 4, 151936, "bf16"),
)


class Inputs(NamedTuple):
    """The tensors of one problem."""

    base: Tensor  # [B, S, H, V]
    labels: Tensor  # [B, S]
    token_weights: Tensor  # [B, S]

    def fresh_logits(self) -> Tensor:
        """A copy of the logits [B, S, H, V] as a layer would give them: no leaf, so it may be overwritten.

        Two of the providers write their gradient over the logits; every provider gets a copy, so that the caches
        hold the same for all of them.
        """
        anchor = torch.zeros((), dtype=self.base.dtype, device=self.base.device, requires_grad=True)
        return self.base + anchor


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Seeded inputs; logits of standard deviation 3, as wide as a trained model's."""
    generator = torch.Generator(device).manual_seed(2404_19737)
    size = (shape.B, shape.S, shape.H, shape.V)
    base = torch.randn(size, generator=generator, dtype=shape.torch_dtype, device=device).mul_(3)
    labels = torch.randint(shape.V, size[:2], generator=generator, device=device)
    labels[:, : int(shape.prompt * shape.S)] = IGNORED
    weights = torch.rand(size[:2], generator=generator, device=device) + 0.1
    return Inputs(base, labels, weights)


def live_mask(labels: Tensor, H: int) -> Tensor:
    """[B, S, H]: head h at t has a target, t + 1 + h."""
    B, S = labels.shape
    live = torch.zeros(B, S, H, dtype=torch.bool, device=labels.device)
    for h in range(min(H, S - 1)):
        live[:, : S - 1 - h, h] = labels[:, 1 + h :] != IGNORED
    return live
