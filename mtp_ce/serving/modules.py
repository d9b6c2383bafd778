"""The tensors of "sequential" heads under the names of an MTP module in a checkpoint, as engines load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from mtp_ce.heads.modules.layout import ModuleLayout
from mtp_ce.heads.protocol import ModelWithHeads
from mtp_ce.heads.trunk import decoder_layers
from mtp_ce.serving.folders import describe
from mtp_ce.unembedding import Unembedding


def checked_modules(wrapper: ModelWithHeads) -> Sequence[Mapping[str, nn.Module]]:
    """Return the modules of "sequential" heads whose depths and logits engines compute as the wrapper does.

    Raises:
        ValueError: heads of another kind, or several modules: vLLM drafts with the first one at every depth. Embeddings
            or logits that an MTP module of an engine does not have: scaled, or with a bias or a softcap.
    """
    heads, causal = wrapper.heads, wrapper.causal
    modules = heads.mtp_modules
    if not modules:
        raise ValueError(
            f"wrapper has {describe(heads)}; expected 'sequential' heads and a horizon above 1, which are an MTP "
            "module. MTPWrapper(model, horizon, heads='sequential', shared=True) makes them."
        )
    if len(modules) > 1:
        raise ValueError(
            f"wrapper has {describe(heads)}, {len(modules)} modules; expected one, with which engines draft at every "
            "depth. MTPWrapper(model, horizon, heads='sequential', shared=True) trains one for all depths."
        )
    output = Unembedding.of(causal)
    for name, found in (
        ("a bias", output.bias is not None),
        (f"a softcap of {output.softcap}", output.softcap is not None),
        (f"a scale of {output.scale}", output.scale != 1),
    ):
        if found:
            raise ValueError(
                f"wrapper.model's logits have {name}; expected none, as vLLM's MTP modules have none. "
                "MTPWrapper.generate(speculative=True) drafts with these heads."
            )
    embed = causal.get_input_embeddings()
    token = torch.zeros(1, dtype=torch.long, device=embed.weight.device)
    if not torch.equal(embed(token)[0], embed.weight[0]):
        raise ValueError(
            f"wrapper.model is {type(causal).__name__}, whose embeddings are scaled or normalised; expected those of "
            "its table, which vLLM's MTP modules read. MTPWrapper.generate(speculative=True) drafts with these heads."
        )
    return modules


def module_tensors(wrapper: ModelWithHeads, layout: ModuleLayout) -> dict[str, Tensor]:
    """Return the tensors of "sequential" heads as a checkpoint of the wrapper's model stores an MTP module.

    Args:
        wrapper: see `checked_modules`.
        layout: names and order.

    Raises:
        ValueError: as `checked_modules`; or the model's final norm is not an RMSNorm.
    """
    modules, causal = checked_modules(wrapper), wrapper.causal
    layers, norm = decoder_layers(causal)
    weight, offset = _gain(causal, norm)
    tensors: dict[str, Tensor] = {}
    for k, parts in enumerate(modules):
        prefix = layout.prefix.format(k=k, layer=k + len(layers))
        for part in ("hidden_norm", "token_norm"):
            tensors[f"{prefix}{getattr(layout, part)}.weight"] = parts[part].get_parameter("weight") - offset
        projection: Tensor = parts["projection"].get_parameter("weight")
        if not layout.hidden_first:
            projection = torch.cat([*reversed(projection.chunk(2, 1))], 1)
        tensors[f"{prefix}{layout.projection}.weight"] = projection
        tensors[f"{prefix}{layout.output_norm}.weight"] = weight
        for name, x in _as_saved(causal, layers, parts["decoder"]).items():
            tensors[prefix + layout.decoder.format(k=k) + name] = x
    return {name: x.detach().contiguous() for name, x in tensors.items()}


def _gain(causal: Any, norm: nn.Module) -> tuple[Tensor, int]:  # [D]
    """Return the final norm's weight, and what its gain has above it: 1 in models that store the difference to 1."""
    weights = dict(norm.named_parameters())
    if "RMSNorm" not in type(norm).__name__ or weights.keys() != {"weight"}:
        raise ValueError(
            f"wrapper.model is {type(causal).__name__} with the final norm {type(norm).__name__}; expected an RMSNorm "
            "with a weight alone, as vLLM's MTP modules have. MTPWrapper.generate(speculative=True) drafts with these "
            "heads."
        )
    weight = weights["weight"]
    with torch.no_grad():  # of ones it returns its gain
        gain = norm(torch.ones(1, 1, len(weight), dtype=weight.dtype, device=weight.device)).flatten()
        return weight, round((gain - weight).float().mean().item())


def _as_saved(causal: Any, layers: nn.ModuleList, layer: nn.Module) -> dict[str, Tensor]:
    """Return a decoder layer's tensors as checkpoints have them, without the prefix: mixtures one tensor per expert."""
    prefix = next(name for name, module in causal.named_modules() if module is layers[-1])
    saved = revert_weight_conversion(causal, {f"{prefix}.{name}": x for name, x in layer.state_dict().items()})
    before = re.compile(rf"^(?:.*\.)?layers\.{len(layers) - 1}\.")
    return {before.sub("", name): x for name, x in saved.items()}
