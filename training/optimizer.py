"""AdamW and its learning rate over the steps."""

from __future__ import annotations

from torch import nn
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

from mtp_ce.training.schema import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Give AdamW over all parameters; weight decay pulls on matrices alone.

    Norms, biases and both embeddings are not decayed: a token that is rare gets few gradients and would
    shrink towards zero by decay alone.

    Args:
        model: a transformers model, or a module that holds some; they say which parameters are embeddings.
        config: rates and decays.
    """
    embeddings = {
        id(embedding.weight)
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        for embedding in (part.get_input_embeddings(), part.get_output_embeddings())
        if embedding is not None
    }
    decayed: list[Parameter] = []
    plain: list[Parameter] = []
    for parameter in model.parameters():  # tied parameters come once
        matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
        (decayed if matrix else plain).append(parameter)
    return AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, steps: int) -> LRScheduler:
    """Give a linear rise over the warm-up and a cosine down to `final_lr_ratio * lr` at the last step."""
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, config.warmup_steps, steps, min_lr_rate=config.final_lr_ratio
    )
