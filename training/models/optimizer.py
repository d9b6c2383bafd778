"""AdamW, its learning rate schedule, and the clipping of gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

from mtp_ce.training.config.loop import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Return AdamW over all parameters, with weight decay on matrices only.

    Norms, biases and both embeddings are not decayed: a rare token gets few gradients, and decay alone would shrink its
    embedding to zero.

    Args:
        model: a transformers model, or a module that contains some; they identify the embeddings. The extra heads of a
            wrapper have their own learning rate.
        config: learning rates and weight decay.
    """
    embeddings = {
        id(embedding.weight)
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        for embedding in (part.get_input_embeddings(), part.get_output_embeddings())
        if embedding is not None
    }
    # torch updates the parameters of a group at once, which DTensors of two meshes can't be.
    groups: dict[tuple[bool, bool, int], list[Parameter]] = {}
    for name, parameter in model.named_parameters():  # tied parameters appear once
        matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
        groups.setdefault((name.startswith("heads."), matrix, _mesh_dims(parameter)), []).append(parameter)
    # The trunk's group comes first, because the logged learning rate is that of the first group.
    return AdamW(
        [
            {
                "params": parameters,
                "lr": config.heads_lr if config.heads_lr and head else config.lr,
                "weight_decay": config.weight_decay if matrix else 0.0,
            }
            for (head, matrix, _), parameters in sorted(groups.items(), key=lambda group: group[0])
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, steps: int) -> LambdaLR:
    """Return a linear warm-up and a cosine decay to `final_lr_ratio * lr`, with transformers' counting of steps.

    The first step of a warm-up has a learning rate of 0, and the last step one slightly above the end of the cosine.
    """
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, config.warmup_steps, steps, min_lr_rate=config.final_lr_ratio
    )


def resume_schedule(schedule: LambdaLR, state: Mapping[str, Any]) -> None:
    """Restore a schedule, and the learning rates of its optimizer, from what `state_dict` returned.

    How many groups the parameters have depends on how they are sharded, so learning rates are computed anew.
    """
    last = [
        base * factor(state["last_epoch"]) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    own = {name: schedule.state_dict()[name] for name in ("base_lrs", "lr_lambdas")}
    schedule.load_state_dict({**state, **own, "_last_lr": last})
    for group, lr in zip(schedule.optimizer.param_groups, last, strict=True):
        group["lr"] = lr


def clip_gradients(parameters: Iterable[Parameter], limit: float | None) -> Tensor:
    """Scale gradients so that their norm is at most `limit`; all ranks that share parameters call this together.

    Args:
        parameters: sharded over a mesh, some over one of its dimensions only, or not.
        limit: the largest norm; None changes nothing.

    Returns:
        [], the L2 norm of the whole gradient before.
    """
    alike: dict[tuple[int, tuple[int, ...]], list[Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            alike.setdefault((_mesh_dims(parameter), _sharded_dims(parameter)), []).append(parameter)
    squares = [_squares(group, dims) for (_, dims), group in alike.items()]
    norm = sum(squares, start=torch.zeros((), dtype=torch.float64)).sqrt().float()
    if limit is not None:
        for group in alike.values():
            clip_grads_with_norm_(group, limit, norm)
    return norm


def _squares(parameters: list[Parameter], dims: tuple[int, ...]) -> Tensor:
    """Return the squared norm of gradients that are sharded over some dimensions of a mesh: [], the same on all."""
    gradients: list[Any] = [x.grad for x in parameters]
    here = [x.to_local() if isinstance(x, DTensor) else x for x in gradients]
    # In fp64: of a million numbers torch's fp32 sum has four right digits on a CPU.
    squares = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in here]).square().sum()
    for dim in dims:
        dist.all_reduce(squares, group=gradients[0].device_mesh.get_group(dim))
    return squares


def _sharded_dims(parameter: Tensor) -> tuple[int, ...]:
    """Over which dimensions of its mesh a parameter is sharded; over the others every rank has it."""
    if not isinstance(parameter, DTensor):
        return ()
    return tuple(dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate())


def _mesh_dims(parameter: Tensor) -> int:
    """How many dimensions the mesh of a parameter has: FSDP's one, or that of shared layers, too."""
    return parameter.device_mesh.ndim if isinstance(parameter, DTensor) else 0
