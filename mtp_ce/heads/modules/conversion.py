"""Tensors of one decoder layer, between the names of a model's files and those of its parameters.

    model.layers.3.mlp.experts.{0, 1, ..}.gate_proj.weight    <->    model.layers.3.mlp.experts.gate_up_proj
    model.layers.3.mlp.experts.{0, 1, ..}.up_proj.weight

transformers converts the files of a whole model. Here its own functions convert one layer: they are given a copy of
the model in which that layer is all there is. The decoder layer of an MTP module is read and written as the layer of
the model whose place it takes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from mtp_ce.heads.trunk import decoder_layers

# PEFT keeps a module that it adapts or trains as a whole one level deeper.
_OF_ADAPTERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.\w+)\.")


class LayerFiles:
    """A decoder layer at a place of its model.

    Args:
        model: the causal language model, which was loaded by transformers.
        index: the place.
        layer: the layer, on the meta device until it is read.

    Attributes:
        prefix: of the layer's parameters in the model.
        file_prefix: of its tensors in the model's files.
        conversions: transformers' own, which reading has used.
    """

    def __init__(self, model: Any, index: int, layer: nn.Module, conversions: list[Any] | None = None) -> None:
        layers, _ = decoder_layers(model)
        path = next(name for name, module in model.named_modules() if module is layers)
        self.prefix = f"{path}.{index}."
        self.model = _emptied(model)
        original, inner = model, self.model
        for name in path.split("."):
            original = getattr(original, name)
            inner._modules[name] = inner = _emptied(original)
        inner._modules[str(index)] = layer
        # A model that was not loaded has none: `revert_weight_conversion` takes its family's then.
        loaded: Any = getattr(model, "_weight_conversions", None)
        self.conversions = loaded if conversions is None else conversions
        # Of a sharded layer, too.
        shapes = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in layer.state_dict().items()}
        names = self.written(shapes)
        self.file_prefix = _up_to(min(names), str(index))

    def read(self, tensors: Mapping[str, Tensor], model: Any, device: torch.device) -> list[str]:
        """Read the layer's parameters, and return what is wrong with the tensors: sentences that begin with a name.

        Args:
            tensors: by their names in files, after `file_prefix`.
            model: the causal language model.
            device: where the parameters are put.
        """
        conversions = list(model._weight_conversions)
        # Those that no layer of the model has needed, as those of experts behind layers without.
        known = {_patterns(conversion) for conversion in conversions}
        conversions += [
            conversion
            for conversion in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(conversion, PrefixChange) and _patterns(conversion) not in known
        ]
        dtype = next(self.model.parameters()).dtype
        settings = LoadStateDictConfig(
            weight_mapping=conversions, device_map={"": device}, dtype=dtype, dtype_plan=model._get_dtype_plan(dtype)
        )
        found = {f"{self.file_prefix}{name}": x for name, x in tensors.items()}
        report, _ = convert_and_load_state_dict_in_model(self.model, found, settings)
        self.conversions = self.model._weight_conversions
        wrong = [f"{self._short(name)} is missing" for name in sorted(report.missing_keys)]
        wrong += [f"{self._short(name)} is not the layer's" for name in sorted(report.unexpected_keys)]
        wrong += [
            f"{self._short(name)} is {list(theirs)}; expected {list(ours)}"
            for name, theirs, ours in sorted(report.mismatched_keys)
        ]
        wrong += [f"{self._short(name)} can't be converted" for name in sorted(report.conversion_errors)]
        return wrong

    def written(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the layer's files by their whole names, those of the place that it takes.

        Args:
            state: the layer's parameters and buffers by their own names.
        """
        self.model._weight_conversions = self.conversions
        tensors: dict[str, Tensor] = revert_weight_conversion(
            self.model, {f"{self.prefix}{name}": x for name, x in state.items()}
        )
        return tensors

    def _short(self, name: str) -> str:
        return name.removeprefix(self.prefix).removeprefix(self.file_prefix)


def names_in_files(model: Any, parameter: Tensor) -> list[str]:
    """Return the names of the tensors that a parameter of the model is stored as."""
    name = next(name for name, x in model.named_parameters(remove_duplicate=False) if x is parameter)
    name = _OF_ADAPTERS.sub(".", name)
    return [*revert_weight_conversion(model, {name: torch.empty(0, device="meta")})]


def _emptied(module: nn.Module) -> Any:
    """Return a copy of a module without its children, parameters and buffers."""
    emptied = copy.copy(module)
    for name in ("_modules", "_parameters", "_buffers"):
        vars(emptied)[name] = {}
    return emptied


def _patterns(conversion: Any) -> tuple[Any, ...]:
    return type(conversion), tuple(conversion.source_patterns), tuple(conversion.target_patterns)


def _up_to(name: str, part: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: parts.index(part) + 1]) + "."
