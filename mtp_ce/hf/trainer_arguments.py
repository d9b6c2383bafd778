"""What a trainer of Hugging Face may be asked for with an `MTPWrapper`: options and bases that would change the loss.

The loss is the wrapper's. Whatever else would compute, replace or patch one is refused by name before the first step;
tests/mtp_ce/hf/test_training_arguments.py lists every field of TrainingArguments and SFTConfig as honoured, refused or
without an effect on the loss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from transformers import Trainer

# What a trainer overrides where the loss, its predictions or its evaluation are not those of `Trainer`.
_OWN_LOSS = ("compute_loss", "prediction_step", "evaluation_loop")


def check_bases(cls: type, own: type) -> None:
    """Check the bases of a class that combines `MTPTrainer` with another trainer.

    Args:
        cls: the class.
        own: `MTPTrainer`.

    Raises:
        TypeError: another trainer comes first, so that its loss would be computed; or it has a loss that isn't the
            next-token cross entropy.
    """
    before = cls.__mro__.index(own)
    for position, base in enumerate(cls.__mro__):
        if not issubclass(base, Trainer) or base is Trainer or issubclass(base, own):
            continue
        if position < before:
            raise TypeError(
                f"{cls.__name__} has {base.__name__} before MTPTrainer, so that its loss would train no head; expected "
                f"class {cls.__name__}(MTPTrainer, {base.__name__})."
            )
        # The next-token loss of SFTTrainer is what the wrapper's replaces.
        replaced = [name for name in _OWN_LOSS if name in vars(base)]
        if replaced and not (base.__name__ == "SFTTrainer" and base.__module__.startswith("trl.")):
            raise TypeError(
                f"{cls.__name__} combines MTPTrainer with {base.__name__}, whose {replaced[0]} is its own and would be "
                f"replaced; expected Trainer or SFTTrainer. {base.__name__}(model=wrapper.model) trains the model "
                "alone, and MTPTrainer the heads on it: MTPWrapper(model, horizon, trunk='detached')."
            )


def check_options(
    construct: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], heads_lr: float | None
) -> None:
    """Check what a trainer is constructed with, before it is: constructing one may patch model classes.

    Args:
        construct: the trainer's constructor.
        arguments: its positional arguments.
        options: its arguments by name.
        heads_lr: of `MTPTrainer`.

    Raises:
        ValueError: an option that would compute another loss, or one that nothing reads.
    """
    try:
        given = inspect.signature(construct).bind(*arguments, **options).arguments
    except TypeError:
        return  # the constructor reports it
    given = {**given, **given.pop("kwargs", {})}
    if heads_lr is not None and not 0 < heads_lr < math.inf:
        raise ValueError(f"heads_lr is {heads_lr}; expected a rate above 0, or None for that of all parameters.")
    if heads_lr is not None and given.get("optimizers", (None,))[0] is not None:
        raise ValueError(
            f"heads_lr is {heads_lr} with an optimizer in optimizers, which has its own rates; expected one of them."
        )
    check_arguments(given.get("args"), given.get("compute_loss_func"))
    columns = getattr(given.get("train_dataset"), "column_names", None) or ()
    # Of TRL's constructor, whose collator passes on tokens and labels alone.
    if "formatting_func" in inspect.signature(construct).parameters and "token_weights" in columns:
        raise ValueError(
            "train_dataset has a column token_weights, which SFTTrainer removes; expected none, or MTPTrainer without "
            "SFTTrainer, with tokens, labels and token_weights as columns."
        )
    if given.get("peft_config") is not None:
        raise ValueError(
            "peft_config is given; expected None: it would wrap the wrapper in adapters. Adapters go inside: "
            "MTPWrapper(get_peft_model(model, peft_config), horizon)."
        )


def check_arguments(args: Any, compute_loss_func: Any) -> None:
    """Check what a trainer has been given for its loss.

    Args:
        args: TrainingArguments or a subclass; None for the defaults.
        compute_loss_func: of the trainer.

    Raises:
        ValueError: an argument that would compute another loss.
    """
    smoothing = getattr(args, "label_smoothing_factor", 0)
    if smoothing:
        raise ValueError(
            f"label_smoothing_factor is {smoothing}; expected 0: Trainer smooths the loss of the model's logits, "
            "and no head would be trained. "
            f"MTPWrapper(label_smoothing={smoothing}) smooths the loss of all heads."
        )
    if compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func is given; expected None: it is called with the model's logits, and no head would be "
            "trained. The wrapper's forward computes the loss; a column token_weights of the data weights it."
        )
    if getattr(args, "use_liger_kernel", False):
        raise ValueError(
            "use_liger_kernel is True; expected False: it replaces the forward of every model of the class in this "
            "process, the wrapper's loss needs none of it, and no logits are built without it either."
        )
    loss_type = getattr(args, "loss_type", "nll")
    if loss_type not in ("nll", "chunked_nll"):  # the same loss: neither builds the logits here
        raise ValueError(
            f"loss_type is {loss_type!r}; expected 'nll': the loss is the wrapper's cross entropy of all heads. "
            "Weights of tokens are a column token_weights of the data of MTPTrainer."
        )


def check_parallelism(parallelism: Any, gpus: int) -> None:
    """Check how a trainer that is constructed divides its batches.

    Args:
        parallelism: accelerate's `ParallelismConfig`, or None.
        gpus: `n_gpu`, of this process; 1 where the model is divided among them.

    Raises:
        ValueError: among the GPUs of one process; or sequences among ranks, by accelerate: heads would lack the targets
            beyond a rank's part, and a batch has labels and shift_labels.
    """
    if gpus > 1:
        raise ValueError(
            f"one process has {gpus} GPUs, for torch.nn.DataParallel, which replicates no hooks; expected one "
            "process per GPU, as torchrun and accelerate start them, or CUDA_VISIBLE_DEVICES with one GPU."
        )
    for name in ("cp_size", "sp_size"):
        size = getattr(parallelism, name, 1)
        if size > 1:
            raise ValueError(
                f"{name} of parallelism_config is {size}; expected 1: labels are cut as tokens are, and the heads "
                "would have no targets beyond a rank's part. MTPTrainer without parallelism_config trains on a data "
                "set of slices whose labels have a halo (docs/heads.md, Hugging Face's trainers)."
            )


def use_router_coefficient(args: Any, wrapper: Any) -> None:
    """Apply `SFTConfig.router_aux_loss_coef`, which TRL writes into the configuration, to the model's own attribute.

    Raises:
        ValueError: TRL adds the routers' loss by default, and the heads have routers of their own.
    """
    coefficient = getattr(args, "router_aux_loss_coef", None)
    requested = getattr(wrapper.causal.config.get_text_config(), "output_router_logits", False)
    if requested and wrapper.heads.may_have_routers:
        raise ValueError(
            f"router_aux_loss_coef is {coefficient}, with which SFTTrainer adds the routers' balancing loss, and heads "
            "that are decoder layers have routers of their own, which no model's loss balances; expected "
            "heads='residual', or SFTConfig(router_aux_loss_coef=0.0)."
        )
    if coefficient is not None and hasattr(wrapper.causal, "router_aux_loss_coef"):
        wrapper.causal.router_aux_loss_coef = coefficient
