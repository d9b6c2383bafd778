"""The providers of each path: this project, eager torch, torch.compile, the peers, and the ceiling of the products.

A provider is called with (*values, labels, token_weights, softcap) and returns the loss []; on the token_ce path with
(hidden, unembed, labels, softcap), and returns ce [B,S,H], 0 where a row has no target. See `shapes.Inputs`.

The ceiling of the linear path is its bare matrix products over the valid rows, rounded up to a multiple of 128, in one
call each and into buffers that were touched before:

    forward and backward    [N,D] x [D,V],  [N,V] x [V,D],  [V,N] x [N,D]          6 N D V operations
    token_ce                [N,D] x [D,V]                                          2 N D V operations
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import eager, peers
from benchmarks.peers import mean, tokens, weighted
from benchmarks.shapes import PROMPT, Inputs, Shape, valid_rows
from mtp_ce import token_ce, weighted_mtp_ce, weighted_mtp_linear_ce

Missing = Callable[[Shape, torch.device], str | None]
# Rows of a product are a multiple of this: odd sizes would slow it down.
ROW_STEP = 128


class AbsentError(Exception):
    """A peer that cannot run a case on this machine, with the reason."""


class Provider(NamedTuple):
    """One implementation of a path, by its name in the results."""

    name: str
    run: Callable[..., Tensor]
    # Returns why it cannot run a shape on a device, or None.
    missing: Missing = lambda shape, device: None
    # It rounds row losses, or sums of gradients, to the dtype of the inputs; the others keep fp32 to the end.
    rounds: bool = False
    # False: it knows no token weights and computes the plain mean over rows, which is less work.
    weighted: bool = True
    # The bare matrix products: no loss, but the ceiling of one.
    ceiling: bool = False
    # Measured at every shape, and drawn in the plots; the others with --full at the first shape of a path.
    swept: bool = True

    @property
    def ours(self) -> bool:
        """Whether it is this project: its failure fails the benchmark, while a peer's is an absence."""
        return self.name.startswith("mtp_ce")


def needs(package: str, label: str, softcap: bool = True, capability: tuple[int, int] = (0, 0)) -> Missing:
    """Return the rule of a package with GPU kernels: a GPU of some capability, and the package installed."""

    def missing(shape: Shape, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "GPU kernels only"
        if not find_spec(package):
            return f"{label} is not installed"
        if torch.cuda.get_device_capability(device) < capability:
            return f"{label} needs compute capability {capability[0]}.{capability[1]}"
        return None if softcap or shape.softcap is None else f"{label} has no softcap"

    return missing


def torch_missing(shape: Shape, device: torch.device) -> str | None:
    """Return what torch's linear_cross_entropy lacks."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__.partition('+')[0]} has no chunked linear_cross_entropy"
    return None if shape.softcap is None else "torch's linear_cross_entropy has no softcap"


def dropped_missing(shape: Shape, device: torch.device) -> str | None:
    """Return where the number of valid rows is no use."""
    if shape.prompt != PROMPT:
        return f"needs a prompt of {PROMPT:.0%}"
    return None if device.type == "cuda" else "a CPU counts valid rows itself"


def ours(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Return a public function with the softcap as its last positional argument."""
    return lambda *inputs: function(*inputs[:-1], softcap=inputs[-1], **options)


def dropped(hidden: Tensor, *rest: Any) -> Tensor:
    """weighted_mtp_linear_ce that is given the number of valid rows, and drops the others without a sync."""
    number = valid_rows(*hidden.shape[:3], PROMPT)
    return ours(weighted_mtp_linear_ce, drop_dead_rows=number)(hidden, *rest)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile of a function with static shapes, which suit it best; compiles when it is first called."""
    make = cache(lambda: torch.compile(function, dynamic=False))
    return lambda *inputs: make()(*inputs)


def operands(shape: Shape, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return rows [N, D], unembed [V, D] and buffers: logits [N, V], and for gradients two like the operands."""
    rows = min(shape.rows, -(-shape.valid_rows // ROW_STEP) * ROW_STEP)
    x = inputs.values["hidden"].flatten(0, 2)[:rows]
    unembed = inputs.values["unembed"]
    # Random, as a gradient is: on zeros a GPU draws less power and runs faster.
    logits = torch.empty(rows, shape.V, dtype=x.dtype, device=x.device).uniform_(-1e-3, 1e-3)
    if shape.path == "token_ce":
        return x, unembed, logits
    return x, unembed, logits, torch.zeros_like(x), torch.zeros_like(unembed)


def products(x: Tensor, unembed: Tensor, logits: Tensor, *gradients: Tensor) -> Tensor:
    """The logits, and both gradients where there are buffers for them."""
    torch.mm(x, unembed.t(), out=logits)
    if gradients:
        d_x, d_unembed = gradients
        torch.mm(logits, unembed, out=d_x)
        torch.mm(logits.t(), x, out=d_unembed)
    return logits


LIGER, CCE = needs("liger_kernel", "liger-kernel"), needs("cut_cross_entropy", "cut-cross-entropy")
QUACK = needs("quack", "quack-kernels", softcap=False, capability=(9, 0))
PLAIN_MEAN = {"weighted": False, "swept": False}

# In the order in which they run: the ceiling first, since shares are of it, and peers last.
PROVIDERS: dict[str, tuple[Provider, ...]] = {
    "linear": (
        Provider("bare_products", products, ceiling=True),
        Provider("mtp_ce", ours(weighted_mtp_linear_ce)),
        Provider("mtp_ce_dropped", dropped, dropped_missing),
        Provider("eager_loop", eager.linear_loop),
        Provider("eager_rows", eager.linear_rows, swept=False),
        Provider("compiled_loop", compiled(eager.linear_loop)),
        Provider("torch_chunked", weighted(peers.torch_chunked), torch_missing, rounds=True),
        Provider("torch_chunked_mean", mean(peers.torch_chunked), torch_missing, rounds=True, **PLAIN_MEAN),
        Provider("liger", weighted(peers.liger), LIGER),
        Provider("liger_4096", weighted(peers.liger_large), LIGER),
        Provider("liger_mean", mean(peers.liger), LIGER, **PLAIN_MEAN),
        Provider("cce", weighted(peers.cce_filtered), CCE, rounds=True),
        Provider("cce_exact", weighted(peers.cce), CCE, rounds=True, swept=False),
        Provider("quack_mean", mean(peers.quack), QUACK, **PLAIN_MEAN),
    ),
    "logits": (
        Provider("mtp_ce", ours(weighted_mtp_ce)),
        Provider("mtp_ce_inplace", ours(weighted_mtp_ce, inplace_backward=True)),
        Provider("eager_loop", eager.logits_loop),
        Provider("eager_rows", eager.logits_rows, swept=False),
        Provider("compiled_loop", compiled(eager.logits_loop)),
        Provider("compiled_rows", compiled(eager.logits_rows), swept=False),
        Provider("liger_heads", peers.liger_logits_heads, LIGER, rounds=True),
        Provider("liger_rows", peers.liger_logits_rows, LIGER, rounds=True),
    ),
    "token_ce": (
        Provider("bare_products", products, ceiling=True),
        Provider("mtp_ce", ours(token_ce)),
        Provider("eager_loop", eager.token_loop),
        Provider("compiled_loop", compiled(eager.token_loop)),
        Provider("torch_chunked", tokens(peers.torch_chunked), torch_missing, rounds=True),
        Provider("liger", tokens(peers.liger), LIGER),
        Provider("cce", tokens(peers.cce), CCE),
    ),
}
BY_NAME = {path: {provider.name: provider for provider in those} for path, those in PROVIDERS.items()}
