"""Extra prediction heads on the hidden states of a language model.

Head 0 is the model's own next-token head and gets the hidden states as they are. Every further head h
moves them a little before the shared unembedding reads them:

    hidden_0 = hidden
    hidden_h = hidden + SiLU(W_h hidden + b_h)          h = 1..H-1, the residual block of Medusa

W_h and b_h start at zero, and SiLU(0) = 0: at initialisation every head sees exactly what head 0 sees,
so adding heads to a trained model changes nothing until they have learnt something. SiLU'(0) = 1/2, so
they do learn from the first step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONFIG_FILE = "mtp_heads.json"
TENSORS_FILE = "mtp_heads.safetensors"


class MTPHeads(nn.Module):
    """H hidden states, one per prediction head, from the one that the trunk gives.

    Args:
        hidden_size: D, the trunk's hidden size.
        horizon: H, the number of heads including head 0; head h predicts the token h + 1 further on.
        kind: the form of a head; "residual" is the Medusa block of the module's docstring.

    Raises:
        ValueError: a size below 1, or an unknown kind.

    Example:
        >>> heads = MTPHeads(hidden_size=8, horizon=3)
        >>> hidden = torch.randn(2, 5, 8)
        >>> [tuple(h.shape) for h in heads(hidden)]
        [(2, 5, 8), (2, 5, 8), (2, 5, 8)]

    Source: arXiv:2401.10774, section 2.1.1.
    """

    def __init__(self, hidden_size: int, horizon: int, kind: Literal["residual"] = "residual") -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size is {hidden_size}; expected at least 1, the trunk's hidden size.")
        if horizon < 1:
            raise ValueError(f"horizon is {horizon}; expected at least 1: head 0 is the next-token head.")
        if kind != "residual":
            raise ValueError(f"kind is {kind!r}; expected 'residual'.")
        self.hidden_size = hidden_size
        self.horizon = horizon
        self.kind = kind
        self.blocks = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(horizon - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put every head back on head 0; also fills parameters made on the meta device."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> list[Tensor]:  # [B, S, D]
        """Return H tensors [B, S, D]; the first one is `hidden` itself, not a copy."""
        return [hidden, *(hidden + F.silu(block(hidden)) for block in self.blocks)]

    def extra_repr(self) -> str:
        """Sizes and kind, for `print(model)`."""
        return f"hidden_size={self.hidden_size}, horizon={self.horizon}, kind={self.kind!r}"

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write `mtp_heads.json` and `mtp_heads.safetensors` into `folder`, beside a saved model.

        Args:
            folder: made where it is missing.
            state_dict: the parameters, where they were gathered from elsewhere; None takes the module's own.

        Raises:
            ModuleNotFoundError: safetensors is not installed; `pip install 'mtp_ce[train]'` brings it.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"kind": self.kind, "hidden_size": self.hidden_size, "horizon": self.horizon}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        tensors = self.state_dict() if state_dict is None else state_dict
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MTPHeads:
        """Read back what `save_pretrained` wrote, in the saved dtype, on the CPU.

        Raises:
            FileNotFoundError: one of the two files is not in `folder`.
            RuntimeError: the tensors are not those that the configuration describes.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        config = json.loads((folder / CONFIG_FILE).read_text())
        with torch.device("meta"):
            heads = cls(**config)
        # assign=True keeps the saved dtype; copying into fp32 parameters would silently widen bf16 heads.
        heads.load_state_dict(load_file(folder / TENSORS_FILE), assign=True)
        return heads
