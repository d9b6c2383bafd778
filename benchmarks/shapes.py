"""The problems that are timed: shapes named after the models whose vocabulary they have, and the tensors of one.

A shape belongs to a path: "logits" (a loss of given logits), "linear" (a loss of hidden states and the output layer's
weight, the logits being nobody's business) or "token_ce" (the cross entropy of every row, forward only).

B is 1 where losses alone are timed: a slice of a head's rows then stays a view, so that no peer pays for a copy that we
do not.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
# The prompt of the shapes that have one, as a share of their labels.
PROMPT = 0.4


class Model(NamedTuple):
    """What decides the cost of a model's loss."""

    V: int
    D: int
    softcap: float | None = None


MODELS = {
    "Llama-2 7B": Model(32000, 4096),
    "GPT-2": Model(50257, 768),
    "GPT-2, padded": Model(50304, 768),
    "Llama-3 8B": Model(128256, 4096),
    "Llama-3.2 1B": Model(128256, 2048),
    "Qwen3 8B": Model(151936, 4096),
    "Qwen3 1.7B": Model(151936, 2048),
    "Qwen2.5 7B": Model(152064, 3584),
    "Gemma-2 2B": Model(256000, 2304, softcap=30.0),
    "Gemma-3 4B": Model(262144, 2560),
}


def live_rows(B: int, S: int, H: int, prompt: float) -> int:
    """Rows that have a target: head h reaches every label that is not ignored, from 1 + h on."""
    ignored = int(prompt * S)
    return B * sum(max(0, S - max(ignored, 1 + h)) for h in range(H))


@dataclass(frozen=True)
class Shape:
    """One problem: B * S * H rows of a model's vocabulary; the first `prompt` of the labels are ignored.

    D is 0 on the logits path, and smaller than the model's where a CPU could not carry that.
    """

    path: str
    model: str
    S: int
    H: int
    dtype: str
    D: int
    prompt: float = 0.0
    B: int = 1

    def __str__(self) -> str:
        width = f"-D{self.D}" if self.D else ""
        prompt = f"-prompt{self.prompt:.0%}".rstrip("%") if self.prompt else ""
        return f"{self.model.replace(' ', '_')}-V{self.V}{width}-H{self.H}-N{self.rows}-{self.dtype}{prompt}"

    @property
    def V(self) -> int:
        """Classes."""
        return MODELS[self.model].V

    @property
    def softcap(self) -> float | None:
        """That of the model."""
        return MODELS[self.model].softcap

    @property
    def rows(self) -> int:
        """N: rows of V logits."""
        return self.B * self.S * self.H

    @property
    def live_rows(self) -> int:
        """Rows that have a target."""
        return live_rows(self.B, self.S, self.H, self.prompt)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    @property
    def logits_bytes(self) -> int:
        """Bytes of all logits, whether anybody builds them or not."""
        return self.rows * self.V * self.torch_dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that are asked for: of the logits, or of hidden and unembed."""
        wanted = {"logits": self.rows * self.V, "linear": (self.rows + self.V) * self.D, "token_ce": 0}
        return wanted[self.path] * self.torch_dtype.itemsize

    def as_dict(self) -> dict[str, Any]:
        """For the results file."""
        derived = {"V": self.V, "softcap": self.softcap, "rows": self.rows, "live_rows": self.live_rows}
        return {**asdict(self), **derived, "logits_bytes": self.logits_bytes, "gradient_bytes": self.gradient_bytes}


@dataclass(frozen=True)
class Inputs:
    """The tensors of one problem; its providers are called with (*fresh(), *rest)."""

    path: str
    values: dict[str, Tensor]  # logits [B, S, H, V]; or hidden [B, S, H, D] and unembed [V, D]
    labels: Tensor  # [B, S]
    token_weights: Tensor  # [B, S]
    softcap: float | None

    @property
    def has_gradient(self) -> bool:
        """A loss has; token_ce has not."""
        return self.path != "token_ce"

    @property
    def rest(self) -> tuple[Any, ...]:
        """What no gradient is taken of."""
        weights = (self.token_weights,) if self.has_gradient else ()
        return self.labels, *weights, self.softcap

    def fresh(self) -> tuple[Tensor, ...]:
        """The values, ready for a gradient where the path has one.

        Logits are a copy, as a layer would give them: no leaf, so they may be overwritten. Two of the providers write
        their gradient over them; everyone gets a copy, so that the caches hold the same for all.
        """
        if not self.has_gradient:
            return tuple(self.values.values())
        if self.path == "linear":
            return tuple(value.detach().requires_grad_() for value in self.values.values())
        base = self.values["logits"]
        return (base + torch.zeros((), dtype=base.dtype, device=base.device, requires_grad=True),)


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Seeded inputs; logits of standard deviation 3, as wide as a trained model's."""
    generator = torch.Generator(device).manual_seed(2404_19737)

    def normal(*size: int, deviation: float) -> Tensor:
        return torch.randn(size, generator=generator, dtype=shape.torch_dtype, device=device).mul_(deviation)

    B, S, H, V, D = shape.B, shape.S, shape.H, shape.V, shape.D
    if shape.path == "logits":
        values = {"logits": normal(B, S, H, V, deviation=3)}
    else:
        values = {"hidden": normal(B, S, H, D, deviation=1), "unembed": normal(V, D, deviation=3 / D**0.5)}
    labels = torch.randint(V, (B, S), generator=generator, device=device)
    labels[:, : int(shape.prompt * S)] = IGNORED
    weights = torch.rand(B, S, generator=generator, device=device) + 0.1
    return Inputs(shape.path, values, labels, weights, shape.softcap)


def head_targets(labels: Tensor, H: int) -> Tensor:
    """[B, S, H]: the label of every row, t + 1 + h; IGNORED past the end."""
    S = labels.shape[1]
    return torch.stack([F.pad(labels[:, k:], (0, min(k, S)), value=IGNORED) for k in range(1, H + 1)], dim=2)
