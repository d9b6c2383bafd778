"""MTP modules as engines load them: the tensors of "sequential" heads under a checkpoint's names, inside its model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtp_ce.heads.modules.conversion import LayerFiles
from mtp_ce.heads.modules.layout import ModuleLayout
from mtp_ce.heads.modules.table import layout_of
from mtp_ce.heads.protocol import ModelWithHeads
from mtp_ce.heads.trunk import decoder_layers
from mtp_ce.serving.base import write_model
from mtp_ce.serving.folders import describe
from mtp_ce.serving.layouts import Serving
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


def tensors_as(layout: ModuleLayout, wrapper: ModelWithHeads) -> dict[str, Tensor]:
    """Return the tensors of "sequential" heads as a checkpoint of the wrapper's model stores an MTP module.

    Args:
        layout: names and order.
        wrapper: see `checked_modules`.

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
        decoder, own = parts["decoder"], LayerFiles(causal, len(layers) - 1, parts["decoder"])
        for name, x in own.written(decoder.state_dict()).items():  # mixtures have one tensor per expert
            tensors[prefix + layout.decoder.format(k=k) + name.removeprefix(own.file_prefix)] = x
    return {name: x.detach().contiguous() for name, x in tensors.items()}


def export_with_module(
    wrapper: ModelWithHeads,
    folder: str | Path,
    layout: ModuleLayout,
    check: Callable[[ModelWithHeads, nn.Module], None],
) -> Serving:
    """Write the model with its heads as the MTP module of its files, and return how vLLM serves it.

    Args:
        wrapper: has "sequential" heads on a model whose checkpoints have modules in this layout, or "native" ones.
        folder: created where it is missing.
        layout: of the module.
        check: raises a ValueError where engines build another decoder layer than that of the heads.

    Raises:
        FileExistsError: `folder` holds a model already.
        ValueError: as `checked_modules` and `export_base`; the model is of another family, or its module in another
            layout.
    """
    heads, model_type = wrapper.heads, wrapper.causal.config.get_text_config(decoder=True).model_type
    tokens = heads.horizon - 1
    # Of Qwen3.5 SGLang knows the vision-language classes alone.
    sglang = 0 if wrapper.causal.config.model_type.endswith("_text") else tokens
    if heads.stored_names:  # the module that the model came with
        if (own := getattr(heads, "layout", layout).name) != layout.name:
            raise ValueError(f"wrapper has an MTP module in the layout {own!r}; expected {layout.name!r}.")
        write_model(wrapper, folder)
        # On a GPU its model runner V2 runs one module per depth.
        several = "vLLM's model runner V1, that of CPUs, drafts with the first of several modules at every depth."
        note = several if tokens > 1 and not heads.shared else ""
        return Serving("mtp", tokens, beside=False, note=note, sglang=sglang)
    (module,) = checked_modules(wrapper)
    if model_type not in layout.families:
        raise ValueError(
            f"wrapper.model has model_type {model_type!r}; expected one of {', '.join(map(repr, layout.families))}, "
            f"whose MTP modules are in the layout {layout.name!r}. Try {layout_of(model_type).name!r} for this one."
        )
    check(wrapper, module["decoder"])
    write_model(wrapper, folder, tensors_as(layout, wrapper))
    _set_counts(Path(folder) / "config.json", layout)
    if layout.of(model_type).passes_normed or tokens == 1:
        return Serving("mtp", tokens, beside=False, sglang=sglang)
    note = "vLLM gives a further depth the hidden state before the last norm, which these heads were not trained on."
    return Serving("mtp", 1, beside=False, note=note, sglang=sglang)


def has_experts(layer: nn.Module) -> bool:
    """Return whether a decoder layer is a mixture of experts."""
    return any(".experts." in f".{name}" for name in layer.state_dict())


def _set_counts(file: Path, layout: ModuleLayout) -> None:
    """Set the numbers of modules in a configuration to 1, in that of the text where there are others."""
    config = json.loads(file.read_bytes())
    config.get("text_config", config).update(dict.fromkeys(layout.counts, 1))
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
