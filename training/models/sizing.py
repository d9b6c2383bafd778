"""The cost of a training step from shapes alone: FLOPs per token, bytes per rank.

FLOPs of one token, forward and backward; a multiply-add counts as two:

    matrices       6 P          P: entries of the parameters that multiply, embedding tables aside
    attention      12 L A S     L layers, A = attention heads * their width, over rows of S tokens, masked positions too
                                (h**2 times that at depth h of a shared module, and h times its matrices)
    unembedding    6 H V D      every head's product with the unembedding; once for "teacher_forcing"

A forward alone is a third of each. A frozen trunk has no backward: neither the gradient of the unembedding (4 H V D)
nor that of the input of residual heads (4 P) is computed. Recomputation counts once; rows without a target and all
experts of a mixture count.

Bytes of a rank: weights, gradients and AdamW's two moments of trained parameters, each divided by the ranks; gathered
FSDP groups; frozen scoring models, sharded except for their output layer; what autograd saves for one micro-batch,
measured by a forward on fake tensors; and the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from accelerate.utils import compute_module_sizes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from mtp_ce.heads.trunk import decoder_layers
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.ops.chunks import CPU_BLOCK_BYTES, ChunkDtypes, most_rows, rows_at_once
from mtp_ce.unembedding import Unembedding


@dataclass(frozen=True)
class Products:
    """FLOPs of one token in a training step.

    Attributes:
        trunk: matrices of the model without its unembedding.
        attention: scores and values, of trunk and heads.
        heads: matrices of the extra heads.
        unembedding: the logits of all heads, and their gradients.
        scoring: forwards of the scorer's frozen models.
    """

    trunk: int
    attention: int
    heads: int
    unembedding: int
    scoring: int = 0

    @property
    def total(self) -> int:
        """Return the sum."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class LossBytes:
    """Bytes that the loss of one micro-batch holds besides hidden states and statistics, by path.

    Attributes:
        linear: one chunk of logits, and the gradients of hidden states and unembedding until backward.
        logits: the logits of all heads, overwritten by their gradient, and the same two gradients.
        eager: torch's cross entropy in a loop over the heads: log-probabilities of all, two gradients of one, fp32.
        chunk_rows: rows of logits that the linear path holds at a time.
    """

    linear: int
    logits: int
    eager: int
    chunk_rows: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in a training step; consecutive micro-batches reach their sum, or nearly.

    Attributes:
        weights: this rank's shards of the parameters.
        gradients: shards of the gradients.
        optimizer: shards of AdamW's two moments.
        gathered: FSDP groups gathered for computation, in its precision.
        scoring: frozen models of the scorer.
        activations: tensors that autograd saves for a micro-batch.
        loss: memory of the loss of a micro-batch.
        offloaded: weights, gradients and optimizer in main memory; not part of the total.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    scoring: int
    activations: int
    loss: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        """Return the bytes on the device."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.offloaded


def step_products(model: MTPWrapper, row_length: int) -> Products:
    """Return the FLOPs of one token in a training step.

    Args:
        model: on any device, meta included.
        row_length: S.
    """
    causal, reaches = model.causal, model.trunk == "joint"
    V, D = Unembedding.of(causal).weight.shape
    runs = model.heads.layer_runs
    attention = attention_products(causal, row_length)
    per_layer = attention // max(1, len(decoder_layers(causal)[0]))
    # The input of a residual head is the trunk's output; layers begin with norms that learn.
    heads = 6 if reaches or runs else 4
    return Products(
        trunk=(6 if reaches else 2) * multiplying(causal.base_model),
        attention=(3 if reaches else 1) * attention + 3 * sum(rows**2 for rows in runs) * per_layer,
        heads=heads * _head_matrices(model),
        unembedding=_unembedding_products(model) * V * D,
    )


def _head_matrices(model: MTPWrapper) -> int:
    """Return the matrix entries of the extra heads, each as often as a token multiplies it in a forward."""
    layers, runs = model.heads.decoder_layers, model.heads.layer_runs
    once = multiplying(model.heads)
    if not layers:
        return once
    # Beside a shared layer, which repeats the depths before, projections are computed once at every depth.
    of_layers = sum(multiplying(layer) for layer in layers)
    return (of_layers * sum(runs) + (once - of_layers) * len(runs)) // len(layers)


def _unembedding_products(model: MTPWrapper) -> int:
    horizon = model.heads.output_count
    # Head 0 of a frozen trunk wants no gradient.
    return 6 * horizon if model.trunk == "joint" else 4 * horizon - 2


def forward_products(model: PreTrainedModel, row_length: int) -> int:
    """Return the FLOPs of one token in the forward of a frozen scoring model."""
    output = model.get_output_embeddings()
    matrices = multiplying(model.base_model) + (output.weight.numel() if output is not None else 0)
    return 2 * matrices + attention_products(model, row_length)


def attention_products(model: Any, row_length: int) -> int:
    """Return the FLOPs of one token's attention scores and values in all layers, forward."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return 4 * int(config.num_hidden_layers * heads * width * row_length)


def multiplying(module: nn.Module) -> int:
    """Return the number of matrix entries, embedding tables excluded."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return sum(x.numel() for x in module.parameters() if x.ndim >= 2 and id(x) not in tables)


def step_memory(
    model: MTPWrapper,
    scoring: Iterable[PreTrainedModel],
    rows: int,
    row_length: int,
    device: torch.device,
    ranks: int,
    *,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> tuple[Memory, LossBytes]:
    """Return the bytes that one rank holds in a training step, and those of the loss on each path.

    Args:
        model: on the meta device; where ranks share its layers, the part of one (`keep_share`).
        scoring: frozen scoring models, on the meta device.
        rows: rows of a micro-batch on this rank.
        row_length: S.
        device: device of the computation.
        ranks: number of ranks over which FSDP shards the model.
        dtype: of forward and backward.
        offload: whether shards are kept in main memory.
    """
    sizes = compute_module_sizes(model)
    trained: nn.Module = model if model.trunk == "joint" else model.heads
    gradients = _bytes(x for x in trained.parameters() if x.requires_grad)
    full = {"weights": sizes[""], "gradients": gradients, "optimizer": 2 * gradients}
    shards = {name: -(-size // ranks) for name, size in full.items()}
    loss = loss_bytes(model, rows, row_length, device, dtype)
    # FSDP also gathers on a single rank, where parameters are cast or copied before the computation.
    grouped = ranks > 1 or offload or dtype != torch.float32
    return Memory(
        **(dict.fromkeys(shards, 0) | {"offloaded": sum(shards.values())} if offload else shards),
        gathered=_gathered(model, sizes[""]) * dtype.itemsize // 4 if grouped else 0,
        scoring=sum(_scoring_bytes(frozen, ranks) for frozen in scoring),
        activations=saved_for_backward(model, rows, row_length, device, dtype),
        loss=loss.linear if model.loss == "linear" else loss.logits,
    ), loss


def _scoring_bytes(model: PreTrainedModel, ranks: int) -> int:
    """Bytes of a frozen scoring model: sharded except for its output layer, with two layers gathered at a time."""
    full = compute_module_sizes(model)[""]
    if ranks == 1:
        return int(full)
    layers = sum(compute_module_sizes(layer)[""] for layer in decoder_layers(model)[0])
    return (
        -(-layers // ranks)
        + 2 * max(compute_module_sizes(layer)[""] for layer in decoder_layers(model)[0])
        + (full - layers)
    )


def _gathered(model: MTPWrapper, full: int) -> int:
    """Bytes of the FSDP groups gathered at a time: the root throughout, the current layer and the prefetched one.

    Gradients of the root and of the current layer are also full-size until they are reduced and scattered.
    """
    layers = [*decoder_layers(model.causal)[0], *model.heads.decoder_layers]
    sizes = [compute_module_sizes(layer)[""] for layer in layers]
    root, largest = full - sum(sizes), max(sizes)
    return int(root + 2 * largest + (root + largest if model.trunk == "joint" else 0))


def loss_bytes(
    model: MTPWrapper, rows: int, row_length: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> LossBytes:
    """Return the bytes of the loss for a micro-batch of `rows` rows of `row_length` tokens, on each path."""
    (V, D), item = Unembedding.of(model.causal).weight.shape, dtype.itemsize
    N = rows * row_length * model.heads.output_count
    learns = model.trunk == "joint"
    d_hidden, sums = N * D * item, V * D * 4 if learns else 0
    dtypes = ChunkDtypes(dtype, dtype, torch.promote_types(dtype, torch.float32) if learns else None)
    chunk = min(N, rows_at_once(N, most_rows(N, V, D, dtypes, device), device))
    d_unembed = sums * item // 4
    # Several chunks are summed in fp32, and the sum is cast when the last chunk is freed.
    summed = max(chunk * V * item + sums, sums + d_unembed if item < 4 else 0)
    # The CPU path gathers the valid rows; its products of half types pack unembed and are summed in blocks.
    gathered = N * D * item if device.type == "cpu" else 0
    if device.type == "cpu" and item < 4:
        gathered += V * D * item + CPU_BLOCK_BYTES // 2
    logits = N * V * item
    return LossBytes(
        linear=(summed if chunk < N else logits + d_unembed) + gathered + d_hidden,
        logits=logits + d_hidden + sums,
        eager=N * V * 4 + 2 * rows * row_length * V * 4,
        chunk_rows=chunk,
    )


def saved_for_backward(
    model: MTPWrapper, rows: int, row_length: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> int:
    """Return the bytes that autograd saves for one micro-batch, parameters excluded, by a forward on fake tensors.

    Args:
        model: on the meta device.
        rows: rows of the micro-batch.
        row_length: S.
        device: device of the fake tensors; operators save different tensors on different devices.
        dtype: of forward and backward, to which parameters are cast.
    """
    # `loss_bytes` counts the loss; its linear path saves nothing through autograd.
    chosen, model.loss = model.loss, "linear"
    with FakeTensorMode():
        fake = {
            name: torch.empty(
                x.shape, dtype=dtype if isinstance(x, nn.Parameter) else x.dtype, device=device
            ).requires_grad_(x.requires_grad)
            for name, x in chain(model.named_parameters(), model.named_buffers())
        }
        tokens = torch.zeros(rows, row_length, dtype=torch.int64, device=device)
        batch = {"position_ids": tokens, "labels": tokens, "document_ids": tokens, "return_stats": True}
        batch["num_items_in_batch"] = torch.ones((), device=device)
        saved: list[Tensor] = []

        def save(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with saved_tensors_hooks(save, lambda tensor: tensor):
            torch.func.functional_call(model, fake, (tokens,), batch)
        model.loss = chosen
        return storage_bytes(saved, fake.values())


def storage_bytes(tensors: Iterable[Tensor], without: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the storages of tensors, each counted once, without those shared with others."""
    excluded = {x.untyped_storage()._cdata for x in without}
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(size for storage, size in storages.items() if storage not in excluded)


def _bytes(tensors: Iterator[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
