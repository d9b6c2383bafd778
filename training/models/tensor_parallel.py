"""Tensor parallelism: every layer, and the vocabulary, over the ranks of a mesh, by torch's styles.

    q, k, v, gate, up    ColwiseParallel     a rank computes some of the outputs, those of its attention heads
    norms of q and k     SequenceParallel    of its attention heads; the weight is whole, its gradient is summed
    o, down              RowwiseParallel     from some of the inputs; the products are summed over the ranks
    embedding            RowwiseParallel     some tokens of the vocabulary; the others' rows are zero, and summed
    output layer         ColwiseParallel     the same tokens; the loss reads the layer, a DTensor, and gathers no logits

What else a layer has, such as its norms, every rank computes alike, and small heads too. Which matrices of a decoder
layer take which style is the plan that transformers has for the architecture; the layers of heads take that of the
trunk's.

Source: arXiv:1909.08053. The styles: torch.distributed.tensor.parallel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from mtp_ce.heads.trunk import decoder_layers
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.training.errors import RecipeError

# By transformers' name: the style, and the dimension of the weight that is sharded. Heads are the third dimension of q.
STYLES: dict[str, tuple[Callable[[], ParallelStyle], int | None]] = {
    "colwise": (ColwiseParallel, 0),
    "rowwise": (RowwiseParallel, 1),
    "replicated_with_grad_allreduce": (partial(SequenceParallel, sequence_dim=2, use_local_output=True), None),
}

_OF_LAYERS = "layers.*."
# Sizes of a configuration that the ranks divide.
_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def layer_plan(model: MTPWrapper, ranks: int) -> dict[str, str]:
    """Return the style of each matrix of a decoder layer, by its name in the layer.

    Args:
        model: the model, not sharded.
        ranks: the number of ranks that share a layer.

    Raises:
        RecipeError: the ranks can't share the layers of this architecture, or of these sizes.
    """
    config: Any = model.causal.config.get_text_config()
    what = f"train.tensor_parallel is {ranks}, but"
    whole = config.base_model_tp_plan or {}
    plan = {name.removeprefix(_OF_LAYERS): style for name, style in whole.items() if name.startswith(_OF_LAYERS)}
    architecture = type(model.causal).__name__
    if not plan:
        raise RecipeError(f"{what} transformers has no plan for the layers of {architecture}; give 1")
    for name, style in plan.items():
        if style not in STYLES:
            known = ", ".join(STYLES)
            raise RecipeError(f"{what} {name} of {architecture} is {style} in its plan, not one of {known}; give 1")
    for module, expected in (
        (model.causal.get_input_embeddings(), nn.Embedding),
        (model.causal.get_output_embeddings(), nn.Linear),
    ):
        if type(module) is not expected:
            found, wanted = type(module).__name__, expected.__name__
            raise RecipeError(f"{what} the vocabulary of {architecture} is a {found}, not a torch {wanted}; give 1")
    for name in _SIZES:
        size = getattr(config, name, ranks)
        if size % ranks:
            raise RecipeError(f"{what} {name} of {architecture} is {size}; give a number that divides it")
    return plan


def share_layers(model: MTPWrapper, mesh: DeviceMesh) -> None:
    """Shard the layers of a model and its vocabulary over a mesh of one dimension, whose ranks hold equal copies.

    Raises:
        RecipeError: as `layer_plan`.
    """
    plan = {name: STYLES[style][0]() for name, style in layer_plan(model, mesh.size()).items()}
    for layer in _layers(model):
        parallelize_module(layer, mesh, plan, src_data_rank=None)
    embedding: Any = model.causal.get_input_embeddings()
    output: Any = model.causal.get_output_embeddings()
    tied = output.weight is embedding.weight
    parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()), src_data_rank=None)
    parallelize_module(output, mesh, ColwiseParallel(), src_data_rank=None)
    if tied:
        output.weight = embedding.weight


def keep_share(model: MTPWrapper, ranks: int) -> None:
    """Shrink a model on the meta device to the largest part that one of the ranks has.

    Raises:
        RecipeError: as `layer_plan`.
    """
    dims = _sharded_dims(model, ranks)
    for name, parameter in model.named_parameters():  # tied parameters appear once
        if name in dims:
            shape = list(parameter.shape)
            shape[dims[name]] = -(-shape[dims[name]] // ranks)
            parameter.data = parameter.data.new_empty(shape)


def _sharded_dims(model: MTPWrapper, ranks: int) -> dict[str, int]:
    """Return the dimension over which each parameter that ranks share is sharded, by name."""
    plan = layer_plan(model, ranks)
    layers = {id(layer) for layer in _layers(model)}
    dims: dict[str, int] = {}
    for prefix, module in model.named_modules():
        if id(module) in layers:
            for name, style in plan.items():
                _, dim = STYLES[style]
                if dim is not None:
                    dims[f"{prefix}.{name}.weight"] = dim
                if style == "colwise":
                    dims[f"{prefix}.{name}.bias"] = 0  # where there is one
        elif module in (model.causal.get_input_embeddings(), model.causal.get_output_embeddings()):
            dims |= {f"{prefix}.{name}": 0 for name, _ in module.named_parameters()}
    return dims


def _layers(model: MTPWrapper) -> list[nn.Module]:
    return [*decoder_layers(model.causal)[0], *model.heads.decoder_layers]
