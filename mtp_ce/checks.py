"""Checks of the public functions' tensors and devices, and the choice of implementation.

A message names the argument, what was expected, what came, and the way out. Only `check_values` reads a tensor's
values, and so waits for a GPU. Options check themselves (options.py).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtp_ce.ops.memory import check_leaves, check_memory
from mtp_ce.ops.rows import check_labels
from mtp_ce.ops.shards import check_same_call
from mtp_ce.options import (
    CHANGES,
    INTEGERS,
    NUMBERS,
    TERMS,
    LossInputs,
    LossOptions,
    VocabShard,
    check_choice,
    read_terms,
)
from mtp_ce.vocabulary import is_dtensor

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MASKS = (torch.bool, *INTEGER_DTYPES)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def require_tensor(name: str, value: object, or_sharded: bool = False) -> None:
    """TypeError unless the value is a plain tensor, or a DTensor where that may be."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; expected a torch.Tensor.")
    if not or_sharded and is_dtensor(value):
        local = "" if name in ("unembed", "bias") else f"{name}.to_local() (a shard by batch) or "
        raise TypeError(
            f"{name} is a DTensor; expected a plain tensor. Call the loss inside the sharded module's forward, where "
            f"parameters are whole, or pass {local}{name}.full_tensor()."
        )


def number_of(term: Any) -> Any:
    """Return a term of the loss as `LossOptions` takes it: a number, or `CHANGES` for a tensor."""
    return CHANGES if isinstance(term, Tensor) else term


def pack_terms(given: Any, loss_scale: Any, softcap: Any, z_loss: Any, label_smoothing: Any) -> Tensor | None:
    """Return all `TERMS` as one tensor [4] where one of them is a 0-d tensor; None where all are numbers.

    Args:
        given: logits or hidden states, maybe unchecked, where the tensors belong.
        loss_scale: a number, like all that follow, or a 0-d tensor.
        softcap: None stands for any number.
        z_loss: checked where it is a number, as the others are.
        label_smoothing: as before.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, shape or device, or one that requires a gradient.
    """
    if not (
        isinstance(loss_scale, Tensor)
        or isinstance(softcap, Tensor)
        or isinstance(z_loss, Tensor)
        or isinstance(label_smoothing, Tensor)
    ):
        return None
    first = given if isinstance(given, Tensor) or not isinstance(given, Sequence) else [*given, None][0]
    terms = (loss_scale, softcap, z_loss, label_smoothing)
    tensors = [(name, term) for name, term in zip(TERMS, terms, strict=True) if isinstance(term, Tensor)]
    for name, term in tensors:
        require_scalar(name, term, first.device if isinstance(first, Tensor) else term.device)
    # Wide enough for every number; on a GPU no copy from the host, which would wait.
    filled = (1.0 if term is None else term for term in terms)
    return torch.stack(
        [
            term.double() if isinstance(term, Tensor) else tensors[0][1].new_full((), term, dtype=torch.float64)
            for term in filled
        ]
    )


def require_scalar(name: str, scalar: Tensor, device: torch.device) -> None:
    """TypeError or ValueError unless the tensor is a real 0-d constant on the device."""
    require_tensor(name, scalar)
    if scalar.dtype == torch.bool or scalar.dtype.is_complex:
        raise TypeError(f"{name} is {scalar.dtype}; expected a number or a 0-d tensor of a real dtype.")
    if scalar.dim() != 0:
        raise ValueError(f"{name} is {_shape(scalar)}; expected a 0-d tensor or a number.")
    if scalar.requires_grad:
        raise ValueError(f"{name} requires a gradient; it is a constant here: pass {name}.detach().")
    if scalar.device != device:
        raise ValueError(f"{name} is on {scalar.device}; expected {device}, where the loss is computed, or a number.")


def _require_values(name: str, tensor: Tensor) -> None:
    """ValueError for a tensor on the meta device, and for the shard of a parameter that ZeRO-3 has partitioned."""
    if tensor.device.type == "meta":
        raise ValueError(
            f"{name} is on meta, where tensors have no values; expected a CPU or GPU tensor. Load the model's weights "
            "first; where they are offloaded, call the loss inside the forward of the module that owns them."
        )
    # Recognised by its attribute: DeepSpeed is not imported for it.
    if tensor.numel() == 0 and hasattr(tensor, "ds_shape"):
        raise ValueError(
            f"{name} is an empty shard of ZeRO-3, of {list(tensor.ds_shape)} elements; expected the whole parameter. "
            "Call the loss in the forward of the module that owns it, or of one that it is registered with: "
            f"deepspeed.zero.register_external_parameter(module, {name})."
        )


def check_logits(logits: Any) -> tuple[list[Tensor], tuple[int, int, int, int]]:
    """Return logits as the operator takes them, and (B, S, H, V)."""
    heads, shape = _check_heads("logits", "V", logits)
    if shape[3] == 0:
        raise ValueError(f"logits is {_shape(heads[0])}: V = 0; expected at least one vocabulary entry.")
    return heads, shape


def check_linear(hidden: Any, unembed: Any, bias: Any) -> tuple[list[Tensor], tuple[int, int, int, int]]:
    """Return hidden states as the operator takes them, and (B, S, H, V)."""
    heads, (B, S, H, D) = _check_heads("hidden", "D", hidden)
    first = heads[0]
    require_tensor("unembed", unembed, or_sharded=True)
    _require_values("unembed", unembed)
    if unembed.dim() != 2 or unembed.shape[1] != D:
        raise ValueError(f"unembed is {_shape(unembed)}; expected [V, D] with D = {D} from hidden.")
    V = unembed.shape[0]
    if V == 0 or D == 0:
        raise ValueError(f"unembed is {_shape(unembed)}; expected [V, D] with V and D of at least 1.")
    others = [("unembed", unembed)]
    if bias is not None:
        require_tensor("bias", bias, or_sharded=True)
        _require_values("bias", bias)
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
    return heads, (B, S, H, V)


def check_chunking(
    chunk_bytes: Any, grad_dtype: Any, logits_dtype: Any, drop_dead_rows: Any, dtype: torch.dtype, V: int
) -> torch.dtype:
    """Check how the linear path divides its rows into chunks of V logits; return the logits' dtype.

    Args:
        chunk_bytes: unchecked, like the three that follow.
        grad_dtype: of sums over chunks.
        logits_dtype: None stands for `dtype`.
        drop_dead_rows: a number or a word.
        dtype: of hidden.
        V: vocabulary size.
    """
    if not isinstance(grad_dtype, torch.dtype):
        raise TypeError(f"grad_dtype is {type(grad_dtype).__name__}; expected a torch.dtype, such as torch.float32.")
    if grad_dtype not in (*TRITON_DTYPES, torch.float64):
        raise ValueError(f"grad_dtype is {grad_dtype}; expected float32, bfloat16, float16 or float64.")
    if logits_dtype is None:
        logits_dtype = dtype
    elif not isinstance(logits_dtype, torch.dtype):
        raise TypeError(
            f"logits_dtype is {type(logits_dtype).__name__}; expected torch.float32, or None for the dtype of hidden."
        )
    elif logits_dtype not in (dtype, wide := torch.promote_types(dtype, torch.float32)):
        raise ValueError(
            f"logits_dtype is {logits_dtype} and hidden is {dtype}; expected {wide}, or None for the dtype of hidden."
        )
    row_bytes = V * logits_dtype.itemsize
    if chunk_bytes is not None:
        if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, INTEGERS):
            raise TypeError(f"chunk_bytes is {type(chunk_bytes).__name__}; expected an int, or None.")
        if chunk_bytes < row_bytes:
            raise ValueError(f"chunk_bytes is {chunk_bytes}; expected at least {row_bytes}, one row of logits.")
    if drop_dead_rows != "auto" and not isinstance(drop_dead_rows, INTEGERS):
        raise TypeError(
            f"drop_dead_rows is {drop_dead_rows!r}; expected 'auto', True, False, or the number of live rows."
        )
    if drop_dead_rows != "auto" and drop_dead_rows < 0:
        raise ValueError(f"drop_dead_rows is {drop_dead_rows}; expected a number of rows of at least 0.")
    return logits_dtype


def _check_heads(name: str, letter: str, value: Any) -> tuple[list[Tensor], tuple[int, int, int, int]]:
    """Return the tensors as a list, and the sizes [B,S,H,`letter`] of all heads together."""
    if isinstance(value, Tensor):
        require_tensor(name, value, or_sharded=True)
        if value.dim() not in (3, 4):
            raise ValueError(
                f"{name} is {_shape(value)}; expected [B, S, H, {letter}], [B, S, {letter}], or H tensors "
                f"[B, S, {letter}]."
            )
        heads = [value]
        H = value.shape[2] if value.dim() == 4 else 1
    elif isinstance(value, Sequence) and not isinstance(value, str):
        heads = list(value)
        H = len(heads)
        for h, head in enumerate(heads):
            require_tensor(f"{name}[{h}]", head, or_sharded=True)
            if head.dim() != 3:
                raise ValueError(f"{name}[{h}] is {_shape(head)}; expected [B, S, {letter}], one tensor a head.")
            if head.shape != heads[0].shape or head.dtype != heads[0].dtype or head.device != heads[0].device:
                raise ValueError(
                    f"{name}[{h}] is {_shape(head)} {head.dtype} on {head.device}; expected "
                    f"{_shape(heads[0])} {heads[0].dtype} on {heads[0].device}, as {name}[0]."
                )
    else:
        raise TypeError(f"{name} is {type(value).__name__}; expected a torch.Tensor or a sequence of them.")
    if H == 0:
        raise ValueError(f"{name} has H = 0 heads; expected at least one.")
    first = heads[0]
    _require_values(name, first)
    if first.dtype not in (*TRITON_DTYPES, torch.float64):
        raise TypeError(f"{name} is {first.dtype}; expected float32, bfloat16, float16 or float64.")
    return heads, (first.shape[0], first.shape[1], H, first.shape[-1])


def check_flags(**flags: Any) -> None:
    """TypeError unless each flag is a bool."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {type(flag).__name__}; expected a bool.")


def check_head_weights(head_weights: Any, options: LossOptions) -> None:
    """Check what can be checked of head weights without the number of heads."""
    if head_weights is None:
        return
    require_tensor("head_weights", head_weights)
    if head_weights.dim() != 1:
        raise ValueError(f"head_weights is {_shape(head_weights)}; expected [H].")
    if not head_weights.is_floating_point():
        raise TypeError(f"head_weights is {head_weights.dtype}; expected a floating dtype.")
    if head_weights.requires_grad:
        raise ValueError("head_weights requires a gradient; they are constants here: pass head_weights.detach().")
    if options.head_reduction == "horizon":
        raise ValueError(
            "head_reduction is 'horizon' and head_weights is given; expected one of them: weights divide by their "
            "own sum over live heads."
        )


def check_inputs(
    first: Tensor,
    shape: tuple[int, int, int, int],
    inputs: LossInputs,
    options: LossOptions,
    source: str = "logits",
) -> None:
    """Check shapes, dtypes and devices of the tensors beside the logits or hidden states.

    Args:
        first: the first tensor of logits or hidden states.
        shape: (B, S, H, V).
        inputs: as the caller passed them.
        options: checked.
        source: the argument that `first` came from, for the messages.
    """
    check_head_weights(inputs.head_weights, options)
    B, S, H, _ = shape
    for name in ("labels", "seq_lens", "document_ids"):
        tensor = getattr(inputs, name)
        if tensor is None and name != "labels":
            continue
        require_tensor(name, tensor)
        if tensor.dtype not in INTEGER_DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; expected an integer dtype, such as torch.int64.")
    labels, seq_lens, document_ids = inputs.labels, inputs.seq_lens, inputs.document_ids
    # Formatted only where it fails: a size in an f-string would pin it under torch.compile.
    if labels.dim() != 2 or labels.shape[0] != B or labels.shape[1] < options.left_halo + S:
        least = "[B, S]" if options.left_halo == 0 else f"[B, left_halo {options.left_halo} + S]"
        raise ValueError(
            f"labels is {_shape(labels)}; expected {least} = {[B, options.left_halo + S]} from {source}, or more "
            "tokens after those, which the last positions predict."
        )
    if seq_lens is not None and _shape(seq_lens) != [B]:
        raise ValueError(f"seq_lens is {_shape(seq_lens)}; expected [B] = {[B]} from {source}.")
    if document_ids is not None and document_ids.shape != labels.shape:
        raise ValueError(f"document_ids is {_shape(document_ids)}; expected {_shape(labels)}, as labels.")
    token_weights, head_weights = inputs.token_weights, inputs.head_weights
    if token_weights is not None:
        require_tensor("token_weights", token_weights)
        if not (token_weights.is_floating_point() or token_weights.dtype in MASKS):
            raise TypeError(f"token_weights is {token_weights.dtype}; expected a floating dtype, or a mask of bools.")
        of_targets = options.weight_alignment == "target"
        if of_targets and token_weights.dim() != 3 and token_weights.shape != labels.shape:
            raise ValueError(
                f"token_weights is {_shape(token_weights)}; expected {_shape(labels)}, as labels, for weights of the "
                "targets."
            )
        if not of_targets and _shape(token_weights) not in ([B, S], [B, S, H]):
            raise ValueError(
                f"token_weights is {_shape(token_weights)}; expected [B, S] = [{B}, {S}] or "
                f"[B, S, H] = [{B}, {S}, {H}] from {source}, for weights of the positions."
            )
        if token_weights.dim() == 3 and of_targets:
            raise ValueError(
                f"weight_alignment is 'target' and token_weights is {_shape(token_weights)}; expected [B, S], or "
                "weight_alignment='position': weights of one row each need no alignment."
            )
    if head_weights is not None and _shape(head_weights) != [H]:
        raise ValueError(f"head_weights is {_shape(head_weights)}; expected [H] = [{H}] from {source}.")
    for name in ("labels", "token_weights", "head_weights", "seq_lens", "document_ids"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {first.device}, where {source} is.")
    _check_normalizer(inputs.normalizer, options.reduction, first.device)


def _check_normalizer(normalizer: Any, reduction: str, device: torch.device) -> None:
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer is given with reduction={reduction!r}; expected reduction='mean'.")
    if isinstance(normalizer, Tensor):
        require_scalar("normalizer", normalizer, device)
    elif isinstance(normalizer, bool) or not isinstance(normalizer, NUMBERS):
        raise TypeError(f"normalizer is {type(normalizer).__name__}; expected a number or a 0-d tensor.")
    elif not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer is {normalizer}; expected a finite number above 0.")


def _triton_missing(device_type: str, source: str) -> str | None:
    """Return why Triton cannot run on tensors of this device; None where it can."""
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


# As torch.compiler.assume_constant_result marks it; the decorator itself imports torch._dynamo, which doubles the time
# that importing this package takes.
_triton_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_impl(impl: str, first: Tensor, source: str = "logits") -> str:
    """Return the implementation that runs; ValueError where it cannot."""
    check_choice("impl", impl)
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


def check_inplace(heads: list[Tensor], entries: list[Tensor], impl: str) -> None:
    """ValueError where the gradient cannot overwrite the logits.

    Args:
        heads: logits, as the caller passed them.
        entries: the same, or this rank's entries of them.
        impl: what runs.
    """
    if impl == "reference":
        raise ValueError("inplace_backward is True; expected False with impl='reference', which has no such path.")
    # Under torch.compile tensors have neither a base nor an address: the operator checks them when it is traced.
    if not torch.compiler.is_compiling():
        check_leaves(heads)
        check_memory(entries)
    if any(x.requires_grad for x in heads) and saved_tensors_are_hooked():
        raise ValueError(
            "inplace_backward is True under hooks for saved tensors, such as non-reentrant activation checkpointing; "
            "expected False: torch would not notice that a tensor saved there is overwritten."
        )


def saved_tensors_are_hooked() -> bool:
    """Return whether hooks replace what autograd saves here: checkpointing, save_on_cpu, the user's own.

    False under torch.compile, which decides itself what is saved.
    """
    if torch.compiler.is_compiling():
        return False
    # torch has no public function for this. The argument: also where something else traces.
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def check_values(inputs: LossInputs, options: LossOptions, shape: tuple[int, int, int, int], shard: VocabShard) -> None:
    """Check the values of the inputs, which synchronises with a GPU."""
    B, S, H, V = shape
    if shard.ranks > 1:
        check_same_call([torch.Size(shape)], inputs, shard, (options, "validate"), wait=True)
    seq_lens, normalizer, T = inputs.seq_lens, inputs.normalizer, inputs.labels.shape[1]
    if seq_lens is not None and bool(((seq_lens < 0) | (seq_lens > T)).any()):
        b = int(((seq_lens < 0) | (seq_lens > T)).nonzero()[0])
        raise ValueError(f"seq_lens[{b}] is {int(seq_lens[b])}; expected a length of labels, in [0, {T}].")
    for name, values in (("token_weights", inputs.token_weights), ("head_weights", inputs.head_weights)):
        if values is not None and not bool(values.isfinite().all()):
            index = (~values.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name}{index} is {float(values[tuple(index)])}; expected finite values.")
    if isinstance(normalizer, Tensor) and not bool(normalizer > 0):
        raise ValueError(f"normalizer is {normalizer.item()}; expected a number above 0.")
    read_terms(inputs, options)
    if B * S:
        check_labels(inputs, options, S, H, V)
