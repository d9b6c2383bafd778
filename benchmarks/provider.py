"""What a provider is: somebody's way of computing the loss, with what must be said of it.

On the logits path it is called as (logits [B,S,H,V], labels [B,S], token_weights [B,S], softcap) -> loss [], on the
linear path as (hidden [B,S,H,D], unembed [V,D], labels, token_weights, softcap) -> loss [], and for token_ce as
(hidden, unembed, labels, softcap) -> ce [B,S,H], 0 where a row has no target.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape

Missing = Callable[[Shape, torch.device], str | None]

NOT_REACHED = "not reached in the time given"
OUT_OF_MEMORY = "out of memory"


class AbsentError(Exception):
    """A provider that cannot run a case on this machine, with the reason."""


def never_missing(shape: Shape, device: torch.device) -> str | None:
    """Nothing keeps torch and mtp_ce from running."""
    return None


class Provider(NamedTuple):
    """A way of computing, with its name in the results."""

    name: str
    run: Callable[..., Tensor]
    # Why it cannot run, or None.
    missing: Missing = never_missing
    # It rounds a row's loss, or sums of gradients, to the dtype of the inputs; the others keep fp32 to the end.
    rounds: bool = False
    # False: the plain mean over rows, for it knows no weight of a token. NOT the same work: less.
    weighted: bool = True
    # The bare products: no loss, but the ceiling of one.
    ceiling: bool = False
    # Compiles for seconds, anew for every shape.
    compiled: bool = False
    # It is on the plots; the others are measured at the first shape of the summary only.
    swept: bool = True

    @property
    def ours(self) -> bool:
        """It is this project, whose failure is a failure; a peer that cannot run is absent."""
        return self.name.startswith("mtp_ce")


def needs(package: str, label: str) -> Missing:
    """Absent where a package with GPU kernels is not installed, or there is no GPU."""

    def missing(shape: Shape, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "GPU kernels only"
        return None if find_spec(package) else f"{label} is not installed"

    return missing
