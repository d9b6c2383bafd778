"""DTensors at the border of the loss: the layouts that it takes, and what this rank holds of them.

    weighted_mtp_ce           logits Shard(-1), of all heads alike
    weighted_mtp_linear_ce    unembed and bias Shard(0); hidden a plain tensor, the same on every rank, or Replicate()

all on one DeviceMesh of one dimension: the ranks that share the vocabulary. Shards are those of torch.chunk, so that
the last ones may be smaller, or empty. Everything else is a plain tensor, the same on every rank. The gradient of a
DTensor has its placement; loss and statistics are plain tensors, the same on every rank. How the ranks compute them:
mtp_ce/ops/shards.py.
"""

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import increment_version

from mtp_ce.ops.shards import fail_on_all_ranks
from mtp_ce.options import VocabShard

OUT_OF_FSDP = "A parameter that FSDP shards is whole inside the forward of its module: call the loss there, or pass {}."


def is_dtensor(value: object) -> bool:
    """Return whether a tensor is a DTensor; importing that class costs seconds that most callers never need."""
    return hasattr(value, "device_mesh") and hasattr(value, "placements")


def whole(tensor: Any) -> Any:
    """Return a tensor with all its entries, gathered where it is a DTensor."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden weight^T + bias, sharded over the vocabulary as the weight is; hidden is a plain tensor."""
    if is_dtensor(weight):
        from torch.distributed.tensor import DTensor, Replicate

        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
        hidden = DTensor.from_local(hidden, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return nn.functional.linear(hidden, weight, bias)


def local_logits(heads: list[Tensor], inplace: bool) -> tuple[list[Tensor], VocabShard]:
    """Return this rank's entries of logits [..., V], and which they are.

    Args:
        heads: plain tensors, or DTensors.
        inplace: the gradient will overwrite the entries.

    Raises:
        ValueError: a layout that is not supported.
    """
    V = heads[0].shape[-1]
    if not any(map(is_dtensor, heads)):
        return heads, VocabShard(V)
    names = ["logits"] if len(heads) == 1 else [f"logits[{h}]" for h in range(len(heads))]
    for name, head in zip(names, heads, strict=True):
        _require_same_mesh(name, head, names[0], heads[0])
    first: Any = heads[0]
    shard = _shard_of(names[0], first, first.dim() - 1)
    for name, head in zip(names, heads, strict=True):
        _shard_of(name, head, head.dim() - 1)
    entries = [_local(head) for head in heads]
    for head, part in zip(heads, entries, strict=True):
        if inplace and part.requires_grad:
            # torch sees a write to the entries, and not that they are a DTensor's: whoever saved that must hear of it.
            part.register_hook(lambda _, head=head: increment_version(head))
    return entries, shard


def local_layer(
    heads: list[Tensor], unembed: Tensor, bias: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor | None, VocabShard]:
    """Return hidden states, and this rank's entries of unembed [V, D] and bias [V], and which they are.

    Raises:
        ValueError: a layout that is not supported.
    """
    if not is_dtensor(unembed):
        for name, other in (*_named(heads), ("bias", bias)):
            if is_dtensor(other):
                raise ValueError(
                    f"{name} is a DTensor and unembed is a plain tensor; expected both on one mesh, or "
                    f"{name}.full_tensor()."
                )
        return heads, unembed, bias, VocabShard(unembed.shape[0])
    shard = _shard_of("unembed", unembed, 0)
    if bias is not None:
        _require_same_mesh("bias", bias, "unembed", unembed)
        _shard_of("bias", bias, 0)
    for name, head in _named(heads):
        if not is_dtensor(head):
            continue
        _require_same_mesh(name, head, "unembed", unembed)
        placements: Any = head.placements  # type: ignore[attr-defined]
        if not all(placement.is_replicate() for placement in placements):
            raise ValueError(
                f"{name} is a DTensor with {_shown(head)}; expected Replicate() over the ranks that share the "
                f"vocabulary, or a plain tensor that is the same on all of them: "
                f"{name}.redistribute(placements=[Replicate()])."
            )
    return [_local(head) for head in heads], _local(unembed), None if bias is None else _local(bias), shard


def _named(heads: list[Tensor]) -> list[tuple[str, Tensor]]:
    return [("hidden" if len(heads) == 1 else f"hidden[{h}]", head) for h, head in enumerate(heads)]


def _local(tensor: Any) -> Any:
    """Return this rank's entries; their gradient becomes a DTensor of the same placement."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _shown(tensor: Any) -> str:
    names = tensor.device_mesh.mesh_dim_names or range(tensor.device_mesh.ndim)
    return ", ".join(f"{p!r} over {name!r}" for p, name in zip(tensor.placements, names, strict=True))


def _require_same_mesh(name: str, tensor: Any, other_name: str, other: Any) -> None:
    if is_dtensor(tensor) != is_dtensor(other):
        plain, placed = (other_name, name) if is_dtensor(tensor) else (name, other_name)
        raise ValueError(
            f"{plain} is a plain tensor and {placed} is a DTensor; expected both as DTensors on one mesh, or both "
            "plain."
        )
    if tensor.device_mesh != other.device_mesh:
        raise ValueError(
            f"{name} is on {tensor.device_mesh} and {other_name} on {other.device_mesh}; expected one mesh: the ranks "
            "that share the vocabulary."
        )


def _shard_of(name: str, tensor: Any, dim: int) -> VocabShard:
    """Return which entries of dimension `dim`, the vocabulary, this rank holds."""
    mesh, V = tensor.device_mesh, tensor.shape[dim]
    gathered = f"{name}.full_tensor()"
    if mesh.ndim != 1:
        raise ValueError(
            f"{name} is a DTensor with {_shown(tensor)}; expected Shard({dim}) on a mesh of one dimension, the ranks "
            f"that share the vocabulary, such as mesh['tp']. {OUT_OF_FSDP.format(gathered)}"
        )
    (placement,) = tensor.placements
    if not (placement.is_shard(dim) or placement.is_shard(dim - tensor.dim())):
        raise ValueError(
            f"{name} is a DTensor with {_shown(tensor)}; expected Shard({dim}), the vocabulary over the ranks, or a "
            f"plain tensor: {name}.redistribute(placements=[Shard({dim})]), or {gathered}."
        )
    rank, ranks = mesh.get_local_rank(), mesh.size()
    if ranks == 1:
        return VocabShard(V)
    shard = VocabShard(V, 0, ranks, mesh.get_group().group_name)
    start = min(V, rank * shard.largest)
    held, expected = tensor.to_local().shape[dim], min(shard.largest, V - start)
    if held != expected:
        fail_on_all_ranks(shard, tensor.device)  # those that hold what they should would wait for this one
        raise ValueError(
            f"{name} is a DTensor of {V} entries of which rank {rank} of {ranks} holds {held}; expected {expected}, as "
            f"torch.chunk divides them and distribute_tensor does: {name}.redistribute of {gathered}."
        )
    return shard._replace(vocab_start=start)
