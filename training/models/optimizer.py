"""AdamW and its learning rate schedule."""

from __future__ import annotations

from torch import nn
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
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
    groups: dict[tuple[bool, bool], list[Parameter]] = {}
    for name, parameter in model.named_parameters():  # tied parameters appear once
        matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
        groups.setdefault((name.startswith("heads."), matrix), []).append(parameter)
    # The trunk's group comes first, because the logged learning rate is that of the first group.
    return AdamW(
        [
            {
                "params": parameters,
                "lr": config.heads_lr if config.heads_lr and head else config.lr,
                "weight_decay": config.weight_decay if matrix else 0.0,
            }
            for (head, matrix), parameters in sorted(groups.items(), key=lambda group: group[0])
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, steps: int) -> LRScheduler:
    """Return a linear warm-up and a cosine decay to `final_lr_ratio * lr`, with transformers' counting of steps.

    The first step of a warm-up has a learning rate of 0, and the last step one slightly above the end of the cosine.
    """
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, config.warmup_steps, steps, min_lr_rate=config.final_lr_ratio
    )
