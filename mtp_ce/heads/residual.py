"""Residual blocks on the last hidden state of a language model.

Head 0 is the model's own next-token head and reads the hidden states as they are. Every further head h adds a residual
block before the shared unembedding:

    hidden_0 = hidden
    hidden_h = hidden + SiLU(W_h hidden + b_h)          h = 1..H-1, the residual block of Medusa

W_h and b_h are initialised to zero, and SiLU(0) = 0: at initialisation every head equals head 0, so that heads added to
a trained model change nothing before they are trained. SiLU'(0) = 1/2, so their gradient is not zero.

Source: arXiv:2401.10774, section 2.1.1.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtp_ce.heads.kinds import CONFIG_FILE, TENSORS_FILE
from mtp_ce.heads.protocol import Heads
from mtp_ce.heads.saved import check_tensors, read_config
from mtp_ce.heads.trunk import TrunkPass


class MTPHeads(Heads):
    """Residual heads: H hidden states, one per prediction head, from the trunk's last one.

    Args:
        hidden_size: D, the trunk's hidden size.
        horizon: H, the number of heads including head 0; head h predicts the token at t + 1 + h.
        kind: "residual", the one kind of this class.

    Raises:
        ValueError: a size below 1, or another kind.

    Example:
        >>> heads = MTPHeads(hidden_size=8, horizon=3)
        >>> hidden = torch.randn(2, 5, 8)
        >>> [tuple(h.shape) for h in heads(hidden)]
        [(2, 5, 8), (2, 5, 8), (2, 5, 8)]

    Source: arXiv:2401.10774, section 2.1.1.
    """

    kind = "residual"

    def __init__(self, hidden_size: int, horizon: int, kind: str = "residual") -> None:
        if hidden_size < 1:
            raise ValueError(f"hidden_size is {hidden_size}; expected at least 1, the trunk's hidden size.")
        if horizon < 1:
            raise ValueError(f"horizon is {horizon}; expected at least 1: head 0 is the next-token head.")
        if kind != type(self).kind:
            raise ValueError(f"kind is {kind!r}; expected {type(self).kind!r}.")
        super().__init__(hidden_size, horizon)
        self.blocks = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(horizon - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make every head equal to head 0; also initialises parameters created on the meta device."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor, trunk: TrunkPass | None = None) -> list[Tensor]:  # [B, S, D]
        """Return H tensors [B, S, D]; the first one is `hidden` itself, not a copy."""
        return [hidden, *(self.checkpointed(partial(_residual, block), hidden) for block in self.blocks)]

    @property
    def residual_blocks(self) -> nn.ModuleList:
        """The linear layer of every extra head."""
        return self.blocks

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MTPHeads:
        """Load what `save_pretrained` wrote, in the saved dtype, on the CPU.

        Raises:
            FileNotFoundError: one of the two files is not in `folder`.
            ValueError: one of them is damaged, or they do not fit each other.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        config = read_config(folder / CONFIG_FILE)
        if config.kind != cls.kind:
            raise ValueError(
                f"{folder} has heads of the kind {config.kind!r}; expected {cls.kind!r}. "
                "MTPWrapper.with_saved_heads(model, folder) puts heads of any kind on their model."
            )
        check_tensors(folder / TENSORS_FILE, config)
        with torch.device("meta"):
            heads = cls(config.hidden_size, config.horizon)
        # assign=True keeps the saved dtype; copying into fp32 parameters would widen bf16 heads without a word.
        saved, wanted = load_file(folder / TENSORS_FILE), heads.state_dict()
        if saved.keys() != wanted.keys() or any(saved[name].shape != x.shape for name, x in wanted.items()):
            raise ValueError(f"{folder / TENSORS_FILE} has tensors of other names or shapes than {config} has.")
        heads.load_state_dict(saved, assign=True)
        return heads


def _residual(block: nn.Module, hidden: Tensor) -> Tensor:  # [B, S, D], both
    return hidden + F.silu(block(hidden))
