"""Document ids of packed rows, from the arguments that tell a model of transformers where documents begin."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_documents(
    labels: torch.Size,  # B, T
    S: int,
    position_ids: Tensor | None,  # [B, S] or [1, S]
    cu_seq_lens: Tensor | None,  # [documents + 1]
) -> Tensor | None:  # [B, S]
    """Number the documents of packed rows; None where no argument has borders of documents.

    Args:
        labels: their shape.
        S: number of positions.
        position_ids: a document begins wherever a position is not the one before plus 1. A single row applies to all.
            Positions with more dimensions, as of images, are ignored.
        cu_seq_lens: 0 and the end of each document, counted over the tokens of all rows, as flash attention takes them.
            Takes precedence over position_ids.

    Raises:
        ValueError: the labels are longer than the positions, so that the borders in their halo are in neither.
    """
    B, T = labels
    packed = position_ids is not None and position_ids.shape in ((B, S), (1, S))
    if T < S:
        return None  # refused as labels
    if T > S and (cu_seq_lens is not None or packed):
        name = "position_ids" if cu_seq_lens is None else "cu_seq_lens_q"
        raise ValueError(
            f"document_ids is None with labels of {T} tokens for {S} positions, and {name} has no borders of documents "
            f"beyond those; expected document_ids [B, T] = [{B}, {T}], all alike where nothing is packed."
        )
    if cu_seq_lens is not None:
        token = torch.arange(B * S, dtype=cu_seq_lens.dtype, device=cu_seq_lens.device)
        return torch.searchsorted(cu_seq_lens[1:].contiguous(), token, right=True).view(B, S)
    if not packed or position_ids is None:
        return None
    begins = torch.zeros_like(position_ids)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return begins.cumsum(1).expand(B, S)
