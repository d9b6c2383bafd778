"""Documents packed into rows, numbered by what tells a model of transformers where they begin."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_documents(
    rows: torch.Size,  # B, S
    position_ids: Tensor | None,  # [B, S] or [1, S]
    cu_seq_lens: Tensor | None,  # [documents + 1]
) -> Tensor | None:  # [B, S]
    """Number the documents of packed rows; None where nothing says that there are any.

    Args:
        rows: shape of the labels.
        position_ids: a document begins wherever a position is not the one before plus 1. Of one row they hold for all.
            Positions of more dimensions, as of images, say nothing here.
        cu_seq_lens: where each document ends, counted over the tokens of all rows, after a 0, as flash attention takes
            it. Goes before position_ids.
    """
    B, S = rows
    if cu_seq_lens is not None:
        token = torch.arange(B * S, dtype=cu_seq_lens.dtype, device=cu_seq_lens.device)
        return torch.searchsorted(cu_seq_lens[1:].contiguous(), token, right=True).view(B, S)
    if position_ids is None or position_ids.shape not in ((B, S), (1, S)):
        return None
    begins = torch.zeros_like(position_ids)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return begins.cumsum(1).expand(B, S)
