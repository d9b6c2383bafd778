"""Whether the gradient may be written over the logits: what else lies in their memory, by storage and strides."""

from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensor


def check_leaves(heads: list[Tensor]) -> None:
    """ValueError where the logits are a leaf's memory."""
    for x in heads:
        # A leaf may itself be a view, of memory that requires no gradient.
        if any(leaf is not None and leaf.is_leaf and leaf.requires_grad for leaf in (x, x._base)):
            raise ValueError(
                "inplace_backward is True and logits is a leaf that requires a gradient, or a view of one; expected "
                "the output of a layer: the leaf's own values would be overwritten."
            )


def check_memory(heads: list[Tensor]) -> None:
    """ValueError where the logits are a leaf's memory, or where two of their rows share memory."""
    check_leaves(heads)
    for x in heads:
        if _overlaps(x):
            raise ValueError(
                "inplace_backward is True and rows of logits share memory, as after expand or unfold; expected memory "
                "of their own, as after .contiguous()."
            )
    if any(not _apart(head, other) for i, head in enumerate(heads) for other in heads[:i]):
        raise ValueError(
            "inplace_backward is True and two heads of logits share memory; expected memory of their own, as after "
            ".clone()."
        )


def _overlaps(x: Tensor) -> bool:
    """Return whether two elements of a tensor may share memory; errs towards True where dimensions interleave."""
    extent = 1  # elements that the dimensions of smaller steps span
    for step, n in sorted((step, n) for step, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if step < extent:
            return x.numel() > 0
        extent += (n - 1) * step
    return False


def _distance(head: Tensor, other: Tensor) -> int | None:
    """Return the elements between two tensors of one dtype; None where they are of separate storages."""
    if not isinstance(head, FakeTensor):
        return abs(head.data_ptr() - other.data_ptr()) // head.element_size()
    if head.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return None
    distance: Any = head.storage_offset() - other.storage_offset()
    return abs(distance)


def _apart(head: Tensor, other: Tensor) -> bool:
    """Return whether two heads of one shape share no memory; where their strides differ this errs towards False."""
    distance = _distance(head, other)
    if distance is None:
        return True
    extent = 1  # elements that the dimensions of smaller steps span
    for step, n in sorted((step, n) for step, n in zip(head.stride(), head.shape, strict=True) if n > 1):
        # One head lies in the gaps that the other's steps leave, as heads of one tensor do.
        if head.stride() == other.stride() and extent <= distance % step <= step - extent:
            return True
        extent += (n - 1) * step
    return distance >= extent
