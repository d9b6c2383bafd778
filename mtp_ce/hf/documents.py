"""Document ids of packed rows, from the arguments that tell a model of transformers where documents begin."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_documents(
    rows: torch.Size,  # B, S
    position_ids: Tensor | None,  # [B, S] or [1, S]
    cu_seq_lens: Tensor | None,  # [documents + 1]
) -> Tensor | None:  # [B, S]
    """Number the documents of packed rows; None where no argument has borders of documents.

    Args:
        rows: shape of the labels.
        position_ids: a document begins wherever a position is not the one before plus 1. A single row applies to all.
            Positions with more dimensions, as of images, are ignored.
        cu_seq_lens: 0 and the end of each document, counted over the tokens of all rows, as flash attention takes them.
            Takes precedence over position_ids.
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
