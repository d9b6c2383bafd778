"""The problems that are timed: shapes named after the model whose vocabulary they have, and their inputs.

A shape belongs to a path: "logits" (weighted_mtp_ce), "linear" (weighted_mtp_linear_ce) or "token_ce" (forward only).

Distributions of the logits matter, because exp is slow where its result underflows on some processors:

    random              normal, standard deviation 3
    masked_vocabulary   three quarters of every row are -1e4, as under a vocabulary mask
    peaked              the label's logit is raised by 30, as late in training

B is 1: a slice of a head's rows then stays a view, so that no peer pays for a copy that this project does not make.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
DISTRIBUTIONS = ("random", "masked_vocabulary", "peaked")
# The fraction of ignored labels in the shapes that have a prompt.
PROMPT = 0.4


class Model(NamedTuple):
    """What determines the cost of a model's loss."""

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


def valid_rows(B: int, S: int, H: int, prompt: float) -> int:
    """Rows that have a target: head h predicts every label from index 1 + h on that is not ignored."""
    ignored = int(prompt * S)
    return B * sum(max(0, S - max(ignored, 1 + h)) for h in range(H))


@dataclass(frozen=True)
class Shape:
    """One problem: B * S * H rows of a model's vocabulary; the first `prompt` of the labels are ignored.

    D is 0 on the logits path, and smaller than the model's on a CPU.
    """

    path: str
    model: str
    S: int
    H: int
    dtype: str
    D: int
    prompt: float = 0.0
    B: int = 1
    distribution: str = "random"

    def __str__(self) -> str:
        width = f"-D{self.D}" if self.D else ""
        prompt = f"-prompt{self.prompt:.0%}".rstrip("%") if self.prompt else ""
        distribution = "" if self.distribution == "random" else f"-{self.distribution}"
        model = self.model.replace(" ", "_")
        return f"{model}-V{self.V}{width}-H{self.H}-N{self.rows}-{self.dtype}{prompt}{distribution}"

    @property
    def V(self) -> int:
        """Vocabulary size."""
        return MODELS[self.model].V

    @property
    def softcap(self) -> float | None:
        """The model's softcap."""
        return MODELS[self.model].softcap

    @property
    def rows(self) -> int:
        """N, the number of rows of V logits."""
        return self.B * self.S * self.H

    @property
    def valid_rows(self) -> int:
        """Rows that have a target."""
        return valid_rows(self.B, self.S, self.H, self.prompt)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    @property
    def logits_bytes(self) -> int:
        """Bytes of all logits, whether a provider builds them or not."""
        return self.rows * self.V * self.torch_dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the returned gradients: of the logits, or of hidden and unembed."""
        elements = {"logits": self.rows * self.V, "linear": (self.rows + self.V) * self.D, "token_ce": 0}
        return elements[self.path] * self.torch_dtype.itemsize

    @property
    def operations(self) -> int:
        """Floating point operations of the matrix products over valid rows; 0 on the logits path."""
        return {"logits": 0, "linear": 6, "token_ce": 2}[self.path] * self.valid_rows * self.D * self.V

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of the results file; a random distribution is left out of it, as in older files."""
        entry = {**asdict(self), "V": self.V, "softcap": self.softcap, "rows": self.rows, "live_rows": self.valid_rows}
        if self.distribution == "random":
            del entry["distribution"]
        return {**entry, "logits_bytes": self.logits_bytes, "gradient_bytes": self.gradient_bytes}


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
        """Whether the path has a backward; token_ce has none."""
        return self.path != "token_ce"

    @property
    def rest(self) -> tuple[Any, ...]:
        """The inputs that need no gradient."""
        weights = (self.token_weights,) if self.has_gradient else ()
        return self.labels, *weights, self.softcap

    def fresh(self) -> tuple[Tensor, ...]:
        """Return the values, ready for a gradient where the path has one.

        Logits are a copy and not a leaf, as an output layer returns them, so they may be overwritten. Two providers
        write the gradient over them; all get a copy, so that the caches hold the same data for each.
        """
        if not self.has_gradient:
            return tuple(self.values.values())
        if self.path == "linear":
            return tuple(value.detach().requires_grad_() for value in self.values.values())
        base = self.values["logits"]
        return (base + torch.zeros((), dtype=base.dtype, device=base.device, requires_grad=True),)


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Return seeded inputs; random logits have standard deviation 3, about that of a trained model."""
    generator = torch.Generator(device).manual_seed(2404_19737)

    def normal(*size: int, deviation: float) -> Tensor:
        return torch.randn(size, generator=generator, dtype=shape.torch_dtype, device=device).mul_(deviation)

    B, S, H, V, D = shape.B, shape.S, shape.H, shape.V, shape.D
    if shape.path == "logits":
        values = {"logits": normal(B, S, H, V, deviation=3)}
    else:
        values = {"hidden": normal(B, S, H, D, deviation=1), "unembed": normal(V, D, deviation=3 / D**0.5)}
    allowed = V // 4 if shape.distribution == "masked_vocabulary" else V
    labels = torch.randint(allowed, (B, S), generator=generator, device=device)
    if shape.distribution == "masked_vocabulary":
        values["logits"][..., allowed:] = -1e4
    elif shape.distribution == "peaked":
        target = head_targets(labels, H).clamp(min=0)[..., None]
        values["logits"].scatter_add_(-1, target, torch.full_like(target, 30, dtype=shape.torch_dtype))
    labels[:, : int(shape.prompt * S)] = IGNORED
    weights = torch.rand(B, S, generator=generator, device=device) + 0.1
    return Inputs(shape.path, values, labels, weights, shape.softcap)


def head_targets(labels: Tensor, H: int) -> Tensor:
    """Return the label t + 1 + h of every row, [B, S, H]; IGNORED past the end."""
    S = labels.shape[1]
    return torch.stack([F.pad(labels[:, k:], (0, min(k, S)), value=IGNORED) for k in range(1, H + 1)], dim=2)
