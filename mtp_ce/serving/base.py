"""Layout "base": the model without its heads, adapters of PEFT merged, for AutoModelForCausalLM.from_pretrained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtp_ce.heads.protocol import ModelWithHeads
from mtp_ce.serving.folders import check_free


def export_base(wrapper: ModelWithHeads, folder: str | Path) -> None:
    """Write the model without the heads, as a folder of transformers.

    Adapters of PEFT are merged into the weights that are written. They are merged in a copy, so that the wrapper keeps
    them apart; such a model needs twice its memory. An MTP module that the model's files have is carried over; heads of
    the kind "native" are written in its place.

    Args:
        wrapper: its model is written, in its dtype.
        folder: created where it is missing.

    Raises:
        FileExistsError: `folder` holds a model already.
        FileNotFoundError: the files of an MTP module that is to be carried over can't be found any more.
        ValueError: the model has adapters that can't be merged, or not the layers of its MTP module.
    """
    write_model(wrapper, folder)


def write_model(wrapper: ModelWithHeads, folder: str | Path, module: Mapping[str, Tensor] | None = None) -> None:
    """Write the model with an MTP module; other arguments and errors as of `export_base`.

    Args:
        wrapper: see there.
        folder: see there.
        module: tensors of an MTP module by their names in the model's files, in place of the one that they have; None
            means that one.
    """
    check_free(folder)
    adapted = wrapper.model is not wrapper.causal or hasattr(wrapper.causal, "peft_config")
    model: Any = _merged(wrapper.model) if adapted else wrapper.model
    stale = adapted or wrapper.trunk == "joint"
    carried = wrapper.carried if module is None else replace(wrapper.carried, names=(), found=True)
    trained = wrapper.heads.module_tensors(model) if module is None else module
    with carried.carried_into(wrapper.causal, folder, stale=stale, trained=trained):
        model.save_pretrained(folder)


def _merged(model: Any) -> Any:
    """Return a copy of a model with its adapters merged into the weights."""
    if hasattr(model, "get_base_model") and not hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"wrapper.model is {type(model).__name__} with adapters that can't be merged into weights; expected LoRA "
            "or another kind with merge_and_unload(). wrapper.model.save_pretrained writes them as they are."
        )
    merged = copy.deepcopy(model)
    if hasattr(merged, "merge_and_unload"):
        return merged.merge_and_unload()
    # transformers inserted the adapters when it loaded a folder, without PEFT's wrapper, which would merge them. Such a
    # model saves its adapters only, so the merged weights go into a new model of its class.
    _merge_layers(merged)
    with torch.device("meta"):
        whole = type(merged)(merged.config)
    whole.load_state_dict(merged.state_dict(), assign=True)
    whole.generation_config = merged.generation_config
    return whole


def _merge_layers(module: nn.Module) -> None:
    child: Any
    for name, child in list(module.named_children()):
        if hasattr(child, "unload_and_optionally_merge_module"):
            setattr(module, name, child.unload_and_optionally_merge_module(True, False, None))
        elif hasattr(child, "base_layer"):
            child.merge()
            setattr(module, name, child.get_base_layer())
        else:
            _merge_layers(child)
