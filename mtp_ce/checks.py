"""Every input check of the public functions, and the choice of implementation.

A message names the argument, what was expected, what came, and the way out. What would read a tensor's values, and so
wait for a GPU, stands in `check_values`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtp_ce.ops.rows import check_labels

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHOICES = {
    "weight_alignment": ("position", "target"),
    "head_reduction": ("live", "horizon"),
    "reduction": ("mean", "sum", "none"),
    "impl": ("auto", "triton", "cpu", "reference"),
}


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def require_tensor(name: str, value: object) -> None:
    """TypeError unless the value is a plain tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; expected a torch.Tensor.")
    # Told by its attributes: importing DTensor costs seconds that most callers never need.
    if hasattr(value, "device_mesh") and hasattr(value, "placements"):
        local = "" if name in ("unembed", "bias") else f"{name}.to_local() (a shard by batch) or "
        raise TypeError(
            f"{name} is a DTensor; expected a plain tensor. Call the loss inside the sharded module's forward, where "
            f"parameters are whole, or pass {local}{name}.full_tensor()."
        )


def check_logits(logits: Any) -> tuple[list[Tensor], tuple[int, int, int, int]]:
    """Logits as the operator takes them, and (B, S, H, V)."""
    given, shape = _check_heads("logits", "V", logits)
    if shape[3] == 0:
        raise ValueError(f"logits is {_shape(given[0])}: V = 0; expected at least one vocabulary entry.")
    return given, shape


def check_linear(hidden: Any, unembed: Any, bias: Any) -> tuple[list[Tensor], tuple[int, int, int, int]]:
    """Hidden states as the operator takes them, and (B, S, H, V)."""
    given, (B, S, H, D) = _check_heads("hidden", "D", hidden)
    first = given[0]
    require_tensor("unembed", unembed)
    if unembed.dim() != 2 or unembed.shape[1] != D:
        raise ValueError(f"unembed is {_shape(unembed)}; expected [V, D] with D = {D} from hidden.")
    V = unembed.shape[0]
    if V == 0 or D == 0:
        raise ValueError(f"unembed is {_shape(unembed)}; expected [V, D] with V and D of at least 1.")
    others = [("unembed", unembed)]
    if bias is not None:
        require_tensor("bias", bias)
        if _shape(bias) != [V]:
            raise ValueError(f"bias is {_shape(bias)}; expected [V] = [{V}] from unembed.")
        others.append(("bias", bias))
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype}; expected {first.dtype}, as hidden. Cast one of them, or call the loss "
                "under torch.autocast."
            )
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {first.device}, where hidden is.")
    return given, (B, S, H, V)


def check_chunking(chunk_bytes: Any, grad_dtype: Any, drop_dead_rows: Any, row_bytes: int) -> None:
    """How the linear path walks its rows of `row_bytes` bytes of logits."""
    if not isinstance(grad_dtype, torch.dtype):
        raise TypeError(f"grad_dtype is {type(grad_dtype).__name__}; expected a torch.dtype, such as torch.float32.")
    if grad_dtype not in (*TRITON_DTYPES, torch.float64):
        raise ValueError(f"grad_dtype is {grad_dtype}; expected float32, bfloat16, float16 or float64.")
    if chunk_bytes is not None:
        if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int):
            raise TypeError(f"chunk_bytes is {type(chunk_bytes).__name__}; expected an int, or None.")
        if chunk_bytes < row_bytes:
            raise ValueError(f"chunk_bytes is {chunk_bytes}; expected at least {row_bytes}, one row of logits.")
    if drop_dead_rows != "auto" and not isinstance(drop_dead_rows, int):
        raise TypeError(
            f"drop_dead_rows is {drop_dead_rows!r}; expected 'auto', True, False, or the number of live rows."
        )
    if drop_dead_rows != "auto" and drop_dead_rows < 0:
        raise ValueError(f"drop_dead_rows is {drop_dead_rows}; expected a number of rows of at least 0.")


def _check_heads(name: str, letter: str, value: Any) -> tuple[list[Tensor], tuple[int, int, int, int]]:
    """The tensors as they were given, and the sizes [B,S,H,`letter`] of all heads together."""
    if isinstance(value, Tensor):
        require_tensor(name, value)
        if value.dim() not in (3, 4):
            raise ValueError(
                f"{name} is {_shape(value)}; expected [B, S, H, {letter}], [B, S, {letter}], or H tensors "
                f"[B, S, {letter}]."
            )
        given = [value]
        H = value.shape[2] if value.dim() == 4 else 1
    elif isinstance(value, Sequence) and not isinstance(value, str):
        given = list(value)
        H = len(given)
        for h, head in enumerate(given):
            require_tensor(f"{name}[{h}]", head)
            if head.dim() != 3:
                raise ValueError(f"{name}[{h}] is {_shape(head)}; expected [B, S, {letter}], one tensor a head.")
            if head.shape != given[0].shape or head.dtype != given[0].dtype or head.device != given[0].device:
                raise ValueError(
                    f"{name}[{h}] is {_shape(head)} {head.dtype} on {head.device}; expected "
                    f"{_shape(given[0])} {given[0].dtype} on {given[0].device}, as {name}[0]."
                )
    else:
        raise TypeError(f"{name} is {type(value).__name__}; expected a torch.Tensor or a sequence of them.")
    if H == 0:
        raise ValueError(f"{name} has H = 0 heads; expected at least one.")
    first = given[0]
    if first.dtype not in (*TRITON_DTYPES, torch.float64):
        raise TypeError(f"{name} is {first.dtype}; expected float32, bfloat16, float16 or float64.")
    return given, (first.shape[0], first.shape[1], H, first.shape[-1])


def check_options(
    *,
    shift: int = 1,
    weight_alignment: str = "position",
    head_reduction: str = "live",
    head_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    loss_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    inplace_backward: bool = False,
    validate: bool = False,
    return_stats: bool = False,
    impl: str = "auto",
) -> None:
    """What each option may be, and which exclude each other."""
    chosen = {
        "weight_alignment": weight_alignment,
        "head_reduction": head_reduction,
        "reduction": reduction,
        "impl": impl,
    }
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, CHOICES[name]))}.")
    for name, integer in (("shift", shift), ("ignore_index", ignore_index)):
        if isinstance(integer, bool) or not isinstance(integer, int):
            raise TypeError(f"{name} is {type(integer).__name__}; expected an int.")
    flags = {"inplace_backward": inplace_backward, "validate": validate, "return_stats": return_stats}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {type(flag).__name__}; expected a bool.")
    numbers_given = {"loss_scale": loss_scale, "z_loss": z_loss, "label_smoothing": label_smoothing}
    if softcap is not None:
        numbers_given["softcap"] = softcap
    for name, number in numbers_given.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} is {type(number).__name__}; expected a float.")
        # Not math.isfinite: torch.compile traces comparisons of a float that changes between calls.
        if not -math.inf < number < math.inf:
            raise ValueError(f"{name} is {number}; expected a finite number.")
    if shift < 0:
        raise ValueError(f"shift is {shift}; expected 0 (labels shifted already), 1 (as in transformers) or more.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; expected a number above 0, or None for no cap.")
    if z_loss < 0:
        raise ValueError(f"z_loss is {z_loss}; expected a factor of at least 0.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a share in [0, 1).")
    if head_weights is not None:
        require_tensor("head_weights", head_weights)
        if head_weights.dim() != 1:
            raise ValueError(f"head_weights is {_shape(head_weights)}; expected [H].")
        if not head_weights.is_floating_point():
            raise TypeError(f"head_weights is {head_weights.dtype}; expected a floating dtype.")
        if head_weights.requires_grad:
            raise ValueError("head_weights requires a gradient; they are constants here: pass head_weights.detach().")
        if head_reduction == "horizon":
            raise ValueError(
                "head_reduction is 'horizon' and head_weights is given; expected one of them: weights divide by their "
                "own sum over live heads."
            )


def check_tensors(
    first: Tensor,
    shape: tuple[int, int, int, int],
    labels: Any,
    token_weights: Any,
    weight_alignment: str,
    head_weights: Tensor | None,
    seq_lens: Any,
    document_ids: Any,
    source: str = "logits",
) -> None:
    """Shapes, dtypes and devices of what goes with the logits."""
    B, S, H, _ = shape
    integers = {"labels": (labels, [B, S]), "seq_lens": (seq_lens, [B]), "document_ids": (document_ids, [B, S])}
    for name, (tensor, wanted) in integers.items():
        if tensor is None and name != "labels":
            continue
        require_tensor(name, tensor)
        if tensor.dtype not in INTEGERS:
            raise TypeError(f"{name} is {tensor.dtype}; expected an integer dtype, such as torch.int64.")
        if _shape(tensor) != wanted:
            # Words are made here only: a size in an f-string would pin it under torch.compile.
            letters = "[B, S]" if len(wanted) == 2 else "[B]"
            raise ValueError(f"{name} is {_shape(tensor)}; expected {letters} = {wanted} from {source}.")
    if token_weights is not None:
        require_tensor("token_weights", token_weights)
        if not token_weights.is_floating_point():
            raise TypeError(f"token_weights is {token_weights.dtype}; expected a floating dtype.")
        if _shape(token_weights) not in ([B, S], [B, S, H]):
            raise ValueError(
                f"token_weights is {_shape(token_weights)}; expected [B, S] = [{B}, {S}] or "
                f"[B, S, H] = [{B}, {S}, {H}] from {source}."
            )
        if token_weights.dim() == 3 and weight_alignment == "target":
            raise ValueError(
                f"weight_alignment is 'target' and token_weights is {_shape(token_weights)}; expected [B, S], or "
                "weight_alignment='position': weights of one row each need no alignment."
            )
    if head_weights is not None and _shape(head_weights) != [H]:
        raise ValueError(f"head_weights is {_shape(head_weights)}; expected [H] = [{H}] from {source}.")
    named = {
        "labels": labels,
        "token_weights": token_weights,
        "head_weights": head_weights,
        "seq_lens": seq_lens,
        "document_ids": document_ids,
    }
    for name, tensor in named.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {first.device}, where {source} is.")


def check_normalizer(normalizer: Any, reduction: str, device: torch.device, source: str = "logits") -> None:
    """A number above 0, or a constant 0-d tensor on the device."""
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer is given with reduction={reduction!r}; expected reduction='mean'.")
    if isinstance(normalizer, Tensor):
        require_tensor("normalizer", normalizer)
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer is {_shape(normalizer)}; expected a 0-d tensor or a number.")
        if normalizer.requires_grad:
            raise ValueError("normalizer requires a gradient; it is a constant here: pass normalizer.detach().")
        if normalizer.device != device:
            raise ValueError(
                f"normalizer is on {normalizer.device}; expected {device}, where {source} is, or a number."
            )
    elif isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise TypeError(f"normalizer is {type(normalizer).__name__}; expected a number or a 0-d tensor.")
    elif not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer is {normalizer}; expected a finite number above 0.")


@torch.compiler.assume_constant_result
def _triton_missing(device_type: str, source: str) -> str | None:
    """Why Triton cannot run on tensors of this device; None where it can."""
    try:
        from triton.runtime.interpreter import InterpretedFunction

        from mtp_ce.kernels.forward import forward_kernel
    except ImportError as error:
        return f"triton is not importable ({error}); install it, or use impl='reference'."
    if device_type == "cuda" or isinstance(forward_kernel, InterpretedFunction):
        return None
    return (
        f"{source} is on {device_type}; expected a GPU, or TRITON_INTERPRET=1 in the environment before triton is "
        "imported. Use impl='auto' or 'cpu' here."
    )


def choose_impl(impl: str, first: Tensor, source: str = "logits") -> str:
    """The implementation that runs, or ValueError where it cannot."""
    kind = first.device.type
    if impl == "auto":
        impl = "cpu" if kind == "cpu" else "triton"
    if impl == "cpu" and kind != "cpu":
        raise ValueError(f"impl is 'cpu' and {source} is on {kind}; expected CPU tensors, or impl='auto'.")
    if impl == "triton":
        missing = _triton_missing(kind, source)
        if missing is not None:
            raise ValueError(f"impl is 'triton': {missing}")
        if first.dtype not in TRITON_DTYPES:
            raise TypeError(
                f"{source} is {first.dtype}; expected float32, bfloat16 or float16 for Triton. Use impl='reference'."
            )
    return impl


def check_inplace(given: list[Tensor], impl: str) -> None:
    """ValueError where the gradient cannot take the logits' place."""
    if impl == "reference":
        raise ValueError("inplace_backward is True; expected False with impl='reference', which has no such path.")
    for x in given:
        leaf = x._base if x._base is not None else x
        if leaf.is_leaf and leaf.requires_grad:
            raise ValueError(
                "inplace_backward is True and logits is a leaf that requires a gradient, or a view of one; expected "
                "the output of a layer: the leaf's own values would be overwritten."
            )
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise ValueError("inplace_backward is True and logits is expanded; expected memory of its own.")
    # Under torch.compile tensors have no addresses, and each graph input is known to be separate.
    if not torch.compiler.is_compiling() and _overlap(given):
        raise ValueError("inplace_backward is True and two heads of logits share memory; expected separate memory.")
    if any(x.requires_grad for x in given) and saved_tensors_are_hooked():
        raise ValueError(
            "inplace_backward is True under hooks for saved tensors, such as non-reentrant activation checkpointing; "
            "expected False: torch would not notice that a tensor saved there is overwritten."
        )


def saved_tensors_are_hooked() -> bool:
    """Something replaces what autograd saves here: checkpointing, save_on_cpu, hooks of the user.

    Not under torch.compile, which decides itself what is saved.
    """
    if torch.compiler.is_compiling():
        return False
    # There is no public name for what torch asks itself. False: no matter whether something else traces.
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _overlap(heads: list[Tensor]) -> bool:
    """Two heads of one shape share memory; where their strides differ this errs towards yes."""
    return any(not _apart(head, other) for i, head in enumerate(heads) for other in heads[:i])


def _apart(head: Tensor, other: Tensor) -> bool:
    distance = abs(head.data_ptr() - other.data_ptr()) // head.element_size()
    steps = sorted((step, n) for step, n in zip(head.stride(), head.shape, strict=True) if n > 1)
    extent = 1  # elements that the dimensions of smaller steps span
    for step, n in steps:
        # One head lies in the gaps that the other's steps leave, as heads of one tensor do.
        if head.stride() == other.stride() and extent <= distance % step <= step - extent:
            return True
        extent += (n - 1) * step
    return distance >= extent


def check_values(
    labels: Tensor,
    token_weights: Tensor | None,
    head_weights: Tensor | None,
    seq_lens: Tensor | None,
    document_ids: Tensor | None,
    normalizer: float | Tensor | None,
    shape: tuple[int, int, int, int],
    shift: int,
    ignore_index: int,
) -> None:
    """What only a look at the values can tell; synchronises."""
    _, S, H, V = shape
    if seq_lens is not None and bool(((seq_lens < 0) | (seq_lens > S)).any()):
        b = int(((seq_lens < 0) | (seq_lens > S)).nonzero()[0])
        raise ValueError(f"seq_lens[{b}] is {int(seq_lens[b])}; expected a length in [0, S] = [0, {S}].")
    for name, values in (("token_weights", token_weights), ("head_weights", head_weights)):
        if values is not None and not bool(values.isfinite().all()):
            place = (~values.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name}{place} is {float(values[tuple(place)])}; expected finite values.")
    if isinstance(normalizer, Tensor) and not bool(normalizer > 0):
        raise ValueError(f"normalizer is {normalizer.item()}; expected a number above 0.")
    if labels.numel():
        check_labels(labels, seq_lens, document_ids, H=H, V=V, shift=shift, ignore_index=ignore_index)
