"""A learning rate of the heads' own: parameter groups that split those of any optimizer."""

from __future__ import annotations

import torch
from torch import nn


def separate_heads(optimizer: torch.optim.Optimizer, heads: nn.Module, lr: float) -> None:
    """Move the heads' parameters of a new optimizer into groups with another learning rate, all else alike.

    Raises:
        ValueError: the optimizer does not have them in its groups.
    """
    wanted = {id(parameter) for parameter in heads.parameters() if parameter.requires_grad}
    for group in [*optimizer.param_groups]:
        of_heads = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if not of_heads:
            continue
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in wanted]
        optimizer.add_param_group({**group, "params": of_heads, "lr": lr})
        wanted -= {id(parameter) for parameter in of_heads}
    if wanted:
        raise ValueError(
            f"heads_lr is {lr} with {type(optimizer).__name__}, without all parameters of the heads in its groups; "
            "expected an optimizer that steps its groups, such as optim='adamw_torch', or heads_lr=None."
        )
