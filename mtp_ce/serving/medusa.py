"""A wrapper's parts as folders that other programs read.

    base     config.json, model.safetensors, ...      AutoModelForCausalLM.from_pretrained
    heads    mtp_heads.json, mtp_heads.safetensors    MTPWrapper.from_pretrained beside a base; MTPHeads.from_pretrained
    medusa   config.json, model.safetensors           vLLM, --speculative-config '{"method": "medusa", "model": ...}'

vLLM's Medusa is one residual block per draft token on the hidden states that the model's output layer reads, and drafts
the likeliest token of each:

    logits_i = logit_scale * (x + SiLU(W_i x + b_i)) U^T        i = 0 .. H-2, x the last hidden state

which is "residual" head i + 1: the token that head 0 predicts is sampled by the model itself. The tensors:

    blocks.{i}.layers.0.weight, .bias    W_i [D, D], b_i [D]    read as such because medusa_fc_bias is true
    lm_head.weight                       U [V, D]               once for all heads because original_lm_head is true

vLLM does not take U from the model that it serves, so it is here too. The folders of FasterDecoding/Medusa hold the
same blocks under other names ({i}.0.linear.weight) in medusa_lm_head.pt; only a recent vLLM renames those.

Source: arXiv:2401.10774, section 2.1.1. Of vllm-project/vllm: vllm/model_executor/models/medusa.py (tensors),
vllm/transformers_utils/configs/medusa.py (configuration), vllm/v1/spec_decode/medusa.py (who calls the heads).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mtp_ce.heads.residual import MTPHeads
from mtp_ce.unembedding import Unembedding

if TYPE_CHECKING:
    from mtp_ce.hf.wrapper import MTPWrapper


def export_base(wrapper: MTPWrapper, folder: str | Path) -> None:
    """Write the model without the heads, as a folder of transformers.

    Adapters of PEFT are merged into the weights that are written. The wrapper keeps its own apart: they are merged in
    a copy, so such a model needs twice its memory.

    Args:
        wrapper: its model is written, in its dtype.
        folder: made where it is missing.

    Raises:
        FileExistsError: `folder` holds a model already.
        ValueError: the model has adapters that can't be merged.
    """
    _new(folder)
    adapted = wrapper.model is not wrapper.causal or hasattr(wrapper.causal, "peft_config")
    model: Any = _merged(wrapper.model) if adapted else wrapper.model
    model.save_pretrained(folder)


def export_heads(wrapper: MTPWrapper, folder: str | Path) -> None:
    """Write the heads without the model.

    Put into the folder of `export_base`, they make what `MTPWrapper.from_pretrained` reads.

    Args:
        wrapper: its heads are written, in their dtype.
        folder: made where it is missing.

    Raises:
        ValueError: there are no extra heads, or they have no parameters.
    """
    if next(wrapper.heads.parameters(), None) is None:
        raise ValueError(
            f"wrapper has {_heads(wrapper)}, which have no parameters; expected 'residual', 'layer' or 'sequential' "
            "heads and a horizon above 1. export_base writes the model."
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    wrapper.heads.save_pretrained(folder)


def export_medusa(wrapper: MTPWrapper, folder: str | Path) -> None:
    """Write "residual" heads as a Medusa draft model, which vLLM serves beside the folder of `export_base`.

    Args:
        wrapper: has "residual" heads; vLLM drafts up to horizon - 1 tokens with them (num_speculative_tokens).
        folder: made where it is missing.

    Raises:
        FileExistsError: `folder` holds a model already.
        ValueError: heads of another kind, none beside head 0, or logits that vLLM's Medusa can't make: with a bias or
            a softcap.
    """
    heads, output = wrapper.heads, Unembedding.of(wrapper.causal)
    if not isinstance(heads, MTPHeads) or not heads.blocks:
        raise ValueError(
            f"wrapper has {_heads(wrapper)}; expected 'residual' heads and a horizon above 1, which is what vLLM's "
            "Medusa has. MTPWrapper(model, horizon, heads='residual') makes them."
        )
    # It drafts the likeliest token, which a softcap does not change; but a folder whose logits are others lies.
    for name, value in (("a bias", output.bias), (f"a softcap of {output.softcap}", output.softcap)):
        if value is not None:
            raise ValueError(
                f"wrapper.model's logits have {name}; expected neither bias nor softcap, which vLLM's Medusa does not "
                "know. MTPWrapper.generate(speculative=True) drafts with these heads."
            )
    from safetensors.torch import save_file

    _new(folder)
    V, D = output.weight.shape
    tensors = {"lm_head.weight": output.weight}
    for i, block in enumerate(heads.blocks):
        assert isinstance(block, nn.Linear)
        tensors |= {f"blocks.{i}.layers.0.weight": block.weight, f"blocks.{i}.layers.0.bias": block.bias}
    # vLLM reads any key with "num" and "heads" in it as num_heads, so there may be only one.
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": D,
        "vocab_size": V,
        "truncated_vocab_size": V,
        "num_heads": len(heads.blocks),
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": True,
        "logit_scale": output.scale,
        "dtype": str(output.weight.dtype).removeprefix("torch."),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _heads(wrapper: MTPWrapper) -> str:
    return f"{wrapper.kind!r} heads with horizon {wrapper.horizon}"


def _new(folder: str | Path) -> None:
    # A Medusa folder and a base have files of the same names.
    if (Path(folder) / "config.json").exists():
        raise FileExistsError(f"folder {folder} holds a model already; expected one without config.json, name another.")


def _merged(model: Any) -> Any:
    """A copy of a model with adapters in which they are part of the weights."""
    if hasattr(model, "get_base_model") and not hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"wrapper.model is {type(model).__name__} with adapters that can't be merged into weights; expected LoRA "
            "or another kind with merge_and_unload(). wrapper.model.save_pretrained writes them as they are."
        )
    merged = copy.deepcopy(model)
    if hasattr(merged, "merge_and_unload"):
        return merged.merge_and_unload()
    # transformers put the adapters in as it read a folder, without the wrapper of PEFT that would do this. Such a model
    # goes on saving adapters only, under names of their own, so another one of its class takes the weights.
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
