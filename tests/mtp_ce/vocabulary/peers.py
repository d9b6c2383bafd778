"""Scenarios of ranks.py with one head: our losses, those of torch's loss_parallel and Liger's, on the same shards.

A case returns loss and gradients three times, whole: ours, the peer's, and those of torch in float64 in one process.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce

N, D, V = 12, 5, 11
Results = list[Tensor]
# What a case changes. Under "class_weights" rows weigh as much as the class of their label.
CASES: dict[str, dict[str, Any]] = {
    "each row": {},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "mean, class weights": {"reduction": "mean", "class_weights": True},
    "a class is ignored": {"reduction": "mean", "ignore_index": 3},
    "label smoothing": {"label_smoothing": 0.2},
    "label smoothing, some ignored": {"label_smoothing": 0.1, "reduction": "mean", "ignored": 5},
    "all ignored": {"reduction": "sum", "ignored": N},
    "an even V": {"V": 32},
    "one entry a rank": {"V": 2},
    "labels of the last rank": {"least_label": V - 3},
    "labels of the first rank": {"V": 32, "most_label": 3},
    "large logits": {"scale": 300.0},
    "large and alike": {"shift": 4096.0},
    "tiny differences": {"scale": 1e-4},
    "entries of the last rank are masked": {"masked": V - 5, "most_label": V - 5},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, large, smoothed": {"dtype": torch.bfloat16, "scale": 30.0, "label_smoothing": 0.1},
}


class Case:
    """Inputs of a case, the same on every rank."""

    def __init__(self, ranks: Any, name: str, linear: bool, **instead: Any) -> None:
        how = {"V": V, "reduction": "none", "ignore_index": -100, "label_smoothing": 0.0, **CASES[name], **instead}
        draw = ranks.conftest.draw_on(torch.device("cpu"))
        dtype, entries = how.get("dtype", torch.float32), how["V"]
        low, high = how.get("least_label", 0), how.get("most_label", entries)
        self.labels = low + draw.integers(high - low, N)
        self.labels[: how.get("ignored", 0)] = how["ignore_index"]
        self.class_weights = draw.uniform(entries) + 0.5 if how.get("class_weights") else None
        self.options = {key: how[key] for key in ("reduction", "ignore_index", "label_smoothing")}
        scale, shift = how.get("scale", 1.0), how.get("shift", 0.0)
        if linear:
            self.tensors = [draw.normal(N, D).to(dtype), (draw.normal(entries, D) * scale).to(dtype)]
        else:
            logits = draw.normal(N, entries) * scale + shift
            logits[:, how.get("masked", entries) :] = -float("inf")
            self.tensors = [logits.to(dtype)]

    def of_torch(self, logits: Tensor) -> Tensor:
        """The loss of logits [N, V] in the dtype that they have."""
        weights = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        return F.cross_entropy(logits, self.labels, weights, **self.options)

    def of_peer(self, leaves: list[Tensor], logits: Callable[..., Tensor]) -> Results:
        """Loss and gradients of loss_parallel. It refuses label smoothing: there torch, of one process, is the peer."""
        if self.options["label_smoothing"]:
            leaves = [leaf(whole(x)) for x in leaves]
            return with_gradients(self.of_torch(logits(*leaves)), leaves)
        with loss_parallel():
            return with_gradients(self.of_torch(logits(*leaves)), leaves)

    def ours(self, loss: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """The loss of tensors of which the first has a batch and a sequence."""
        options = dict(self.options)
        weights = None
        if self.class_weights is not None:
            weights = self.class_weights[self.labels]
            options["normalizer"] = weights.sum()
            weights = weights[None]
        return loss(*tensors, self.labels[None], weights, shift=0, **options)


def with_gradients(loss: Tensor, leaves: list[Tensor]) -> Results:
    """Loss and gradients, whole, without the batch."""
    gradients = torch.autograd.grad(loss.sum(), leaves)
    return [whole(x).detach().squeeze(0) for x in (loss, *gradients)]


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


SCENARIOS: dict[str, Callable[[Any], Any]] = {}


def scenario(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    SCENARIOS[function.__name__] = function
    return function


def place(ranks: Any, x: Tensor, dim: int) -> DTensor:
    return distribute_tensor(x, ranks.mesh, [Shard(dim)])


@scenario
def loss_parallel_of_logits(ranks: Any) -> dict[str, tuple[Results, Results, Results]]:
    found = {}
    for name in CASES:
        case = Case(ranks, name, linear=False)
        (logits,) = case.tensors
        shard, theirs, exact = leaf(place(ranks, logits[None], 2)), leaf(place(ranks, logits, 1)), leaf(logits.double())
        peer = case.of_peer([theirs], lambda x: x.float())
        found[name] = (
            with_gradients(case.ours(weighted_mtp_ce, shard), [shard]), peer,
            with_gradients(case.of_torch(exact), [exact]),
        )  # fmt: skip
    return found


@scenario
def loss_parallel_of_layers(ranks: Any) -> dict[str, tuple[Results, Results, Results]]:
    """The layer of the peer is column-parallel: hidden states replicated, logits a shard."""
    found = {}
    for name, how in CASES.items():
        if "shift" in how or "masked" in how:
            continue
        case = Case(ranks, name, linear=True)
        hidden, unembed = case.tensors
        ours = [leaf(hidden[None]), leaf(place(ranks, unembed, 0))]
        theirs = [leaf(DTensor.from_local(hidden, ranks.mesh, [Replicate()])), leaf(place(ranks, unembed, 0))]
        exact = [leaf(hidden.double()), leaf(unembed.double())]
        peer = case.of_peer(theirs, lambda *layer: F.linear(*layer).float())
        found[name] = (
            with_gradients(case.ours(weighted_mtp_linear_ce, *ours), ours), peer,
            with_gradients(case.of_torch(F.linear(*exact)), exact),
        )  # fmt: skip
    return found


@scenario
def liger(ranks: Any) -> dict[str, tuple[Results, Results, Results]] | None:
    """Its kernels in Triton's interpreter, on CPUs; None where it is not installed.

    It takes shards of one size, and returns the loss of each row.
    """
    try:
        from liger_kernel.ops.vocab_parallel_cross_entropy import LigerVocabParallelCEFunction
    except ImportError:
        return None
    found = {}
    for name, how in CASES.items():
        if "class_weights" in how:
            continue
        case = Case(ranks, name, linear=False, V=how.get("V", V + 1), reduction="none")
        (logits,) = case.tensors
        shard, theirs, exact = leaf(place(ranks, logits[None], 2)), leaf(place(ranks, logits, 1)), leaf(logits.double())
        loss = LigerVocabParallelCEFunction.apply(
            theirs.to_local()[:, None], case.labels[:, None], ranks.mesh.get_group(),
            case.options["ignore_index"], case.options["label_smoothing"], "pytorch", "global",
        )  # fmt: skip
        found[name] = (
            with_gradients(case.ours(weighted_mtp_ce, shard), [shard]), with_gradients(loss[:, 0], [theirs]),
            with_gradients(case.of_torch(exact), [exact]),
        )  # fmt: skip
    return found
