"""AdamW and its learning rate over the steps."""

from __future__ import annotations

from torch import nn
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

from mtp_ce.training.config.loop import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Give AdamW over all parameters; weight decay pulls on matrices alone.

    Norms, biases and both embeddings are not decayed: a token that is rare gets few gradients and would
    shrink towards zero by decay alone.

    Args:
        model: a transformers model, or a module that holds some; they say which parameters are embeddings. Those of
            a wrapper's extra heads have a learning rate of their own.
        config: rates and decays.
    """
    embeddings = {
        id(embedding.weight)
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        for embedding in (part.get_input_embeddings(), part.get_output_embeddings())
        if embedding is not None
    }
    groups: dict[tuple[bool, bool], list[Parameter]] = {}
    for name, parameter in model.named_parameters():  # tied parameters come once
        matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
        groups.setdefault((name.startswith("heads."), matrix), []).append(parameter)
    # The trunk comes first: its learning rate is the one that is logged.
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
    """Give a linear rise over the warm-up and a cosine down to `final_lr_ratio * lr`, as transformers counts steps.

    The first step of a warm-up has the rate 0, and the last step's is a little above the end of the cosine.
    """
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, config.warmup_steps, steps, min_lr_rate=config.final_lr_ratio
    )
