"""The ceiling of the linear path: its bare matrix products, and nothing between them.

    forward and backward    [N,D] x [D,V],  [N,V] x [V,D],  [V,N] x [N,D]          6 N D V operations
    token_ce                [N,D] x [D,V]                                          2 N D V

All rows at once, into buffers that were touched before the clock starts: on two cores that is as fast as chunks of 1024
rows and up to a fifth faster than smaller ones. N is the rows that have a target, rounded up to a multiple of 128: no
implementation needs more, and odd sizes would slow a product down.
"""

import torch
from torch import Tensor

from benchmarks.shapes import Inputs, Shape

STEP = 128


def operands(shape: Shape, inputs: Inputs) -> tuple[Tensor, ...]:
    """Rows [N, D], unembed [V, D], and touched buffers: logits [N, V], and for a gradient two like the operands."""
    rows = min(shape.rows, -(-shape.live_rows // STEP) * STEP)
    x = inputs.values["hidden"].flatten(0, 2)[:rows]
    unembed = inputs.values["unembed"]
    # Values as a gradient has them; on zeros a GPU draws less power and runs faster.
    logits = torch.empty(rows, shape.V, dtype=x.dtype, device=x.device).uniform_(-1e-3, 1e-3)
    if shape.path == "token_ce":
        return x, unembed, logits
    return x, unembed, logits, torch.zeros_like(x), torch.zeros_like(unembed)


def three_products(x: Tensor, unembed: Tensor, logits: Tensor, d_x: Tensor, d_unembed: Tensor) -> Tensor:
    """Of forward and backward."""
    torch.mm(x, unembed.t(), out=logits)
    torch.mm(logits, unembed, out=d_x)
    return torch.mm(logits.t(), x, out=d_unembed)


def one_product(x: Tensor, unembed: Tensor, logits: Tensor) -> Tensor:
    """Of forward."""
    return torch.mm(x, unembed.t(), out=logits)


def operations(shape: Shape) -> int:
    """Floating point operations of the products of the live rows."""
    return {"linear": 6, "token_ce": 2}[shape.path] * shape.live_rows * shape.D * shape.V
