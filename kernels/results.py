"""What the launchers take and write beside logits: the same for the kernels and the CPU path.

Each is one kernel argument. Needs neither torch nor triton.
"""

from typing import Any, NamedTuple


class ForwardResults(NamedTuple):
    """What a forward writes; None where not wanted."""

    out: Any  # [B, S]
    ce: Any  # [B, S, H], like all below
    row_max: Any
    log_sum: Any
    valid: Any
    top1: Any
    d_row_weights: Any  # d out / d w of each row


class Partials(NamedTuple):
    """Results of part of the entries of rows, as the kernels store and the ranks send them: a float each."""

    maximum: Any
    row_sum: Any  # of exp(z - maximum)
    label_logit: Any  # 0 where another part holds the label
    entries: Any  # their number; this and the two below with label smoothing
    base: Any
    total: Any  # of z - base
    argmax: Any  # an integer, bit for bit


class Rows(NamedTuple):
    """Rows of the linear path, or one chunk of them, before any logit is computed; [N] each."""

    label: Any  # int32, 0 where the row is not valid, -1 outside [0, V)
    coefficient: Any
    row_mask: Any  # bool: the row is computed


class RowResults(NamedTuple):
    """What a chunk writes of its rows, [N] each; None where not wanted."""

    ce: Any
    row_loss: Any
    lse: Any
    top1: Any  # int32
