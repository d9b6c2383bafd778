"""Layout "mimo": one "sequential" module of a dense model as a draft model of vLLM, config.json and model.safetensors.

    vllm serve BASE --hf-overrides '{"num_nextn_predict_layers": 1}'
        --speculative-config '{"method": "mtp", "model": MIMO, "num_speculative_tokens": K}'

vLLM's MiMoMTP runs one module at every depth, each on the normed output of the depth before, and masks the embedding at
position 0: a shared module of "sequential" heads, or the only one of a horizon of 2. Its layer is Qwen2's, built from
the configuration of the model that is served, which --hf-overrides adds to:

    num_nextn_predict_layers    1
    qk_norm                     true for a model with norms on q and k, such as Qwen3

Llama's layer is Qwen2's with biases of zero on q, k and v. Embedding and output layer are those of the model served, so
that the folder has neither. The tensors are those of `mtp_ce.heads.modules.mimo`.

Source: of vllm-project/vllm 0.32: vllm/model_executor/models/mimo_mtp.py and qwen2.py (tensors, layer),
vllm/config/speculative.py (configuration), vllm/v1/spec_decode/llm_base_proposer.py (calls; shared embeddings).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from mtp_ce.heads.modules.mimo import LAYOUT
from mtp_ce.heads.protocol import ModelWithHeads
from mtp_ce.heads.trunk import decoder_layers, observed
from mtp_ce.serving.folders import check_free
from mtp_ce.serving.layouts import Serving
from mtp_ce.serving.modules import checked_modules, tensors_as
from mtp_ce.unembedding import undisturbed

# What vLLM's layer reads of the configuration.
_READ = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "hidden_act"),
    *("rope_parameters", "max_position_embeddings", "vocab_size", "num_hidden_layers"),
)


def export_mimo(wrapper: ModelWithHeads, folder: str | Path) -> Serving:
    """Write "sequential" heads as a draft model of vLLM's MiMo, which is served beside the folder of `export_base`.

    Args:
        wrapper: has "sequential" heads on a dense model with layers as of Llama, Qwen2 or Qwen3, with one module.
        folder: created where it is missing.

    Returns:
        how vLLM serves it.

    Raises:
        FileExistsError: `folder` holds a model already.
        ValueError: heads of another kind, several modules, or a model whose layers, embeddings or logits vLLM's MiMo
            does not compute.
    """
    (module,) = checked_modules(wrapper)
    layer, config = module["decoder"], _config(wrapper)
    weights = {name: x.detach() for name, x in layer.state_dict().items()}
    for name in ("q_proj", "k_proj", "v_proj"):
        if (weight := weights.get(f"self_attn.{name}.weight")) is not None:
            weights.setdefault(f"self_attn.{name}.bias", weight.new_zeros(len(weight)))
    _check_layer(wrapper, layer, config, weights)
    check_free(folder)
    tensors = tensors_as(LAYOUT, wrapper)
    prefix = LAYOUT.prefix.format(k=0)
    tensors |= {prefix + name: x.contiguous() for name, x in weights.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    overrides: dict[str, Any] = {"num_nextn_predict_layers": 1}
    tokens = wrapper.heads.horizon - 1
    if _has_qk_norm(layer):  # which SGLang's layer does not have
        return Serving("mtp", tokens, overrides | {"qk_norm": True})
    return Serving("mtp", tokens, overrides, sglang=tokens)


def _has_qk_norm(layer: nn.Module) -> bool:
    return "self_attn.q_norm.weight" in layer.state_dict()


def _config(wrapper: ModelWithHeads) -> Qwen2Config:
    own = wrapper.causal.config.get_text_config(decoder=True)
    missing = [name for name in _READ if getattr(own, name, None) is None]
    if missing:
        raise _unsupported(wrapper, f"its configuration has no {missing[0]}")
    values: dict[str, Any] = {name: getattr(own, name) for name in _READ}
    values |= {"head_dim": own.hidden_size // own.num_attention_heads, "tie_word_embeddings": False}
    values |= {"num_nextn_predict_layers": 1, "architectures": ["MiMoForCausalLM"]}
    return Qwen2Config(**values, dtype=next(wrapper.heads.parameters()).dtype)


def _unsupported(wrapper: ModelWithHeads, reason: str) -> ValueError:
    return ValueError(
        f"wrapper.model is {type(wrapper.causal).__name__}, and {reason}; expected decoder layers of Llama, Qwen2 or "
        "Qwen3, which vLLM's MiMo computes. MTPWrapper.generate(speculative=True) drafts with these heads."
    )


def _check_layer(wrapper: ModelWithHeads, layer: nn.Module, config: Qwen2Config, weights: dict[str, Tensor]) -> None:
    """Check the layer against transformers' own Qwen2 layer, which computes what vLLM's does.

    Raises:
        ValueError: it has other tensors, or returns something else.
    """
    values: dict[str, Any] = {**config.to_dict(), "attn_implementation": "eager"}
    reference: nn.Module = Qwen2DecoderLayer(Qwen2Config(**values), 0)
    if _has_qk_norm(layer):
        # Its output projection has a bias, too, where q, k and v have one.
        reference = Qwen3DecoderLayer(Qwen3Config(**values, attention_bias=True), 0)
        weights = {**weights, "self_attn.o_proj.bias": weights["self_attn.o_proj.weight"].new_zeros(config.hidden_size)}
    try:
        reference.load_state_dict({name: x.float() for name, x in weights.items()})
    except RuntimeError as error:
        expected, found = reference.state_dict(), weights
        other = sorted(expected.keys() ^ found.keys()) or [n for n in expected if expected[n].shape != found[n].shape]
        raise _unsupported(wrapper, f"its layers differ in {other[0]}") from error
    if config.hidden_act != "silu":
        raise _unsupported(wrapper, f"its activation is {config.hidden_act}")
    own = wrapper.causal.config.get_text_config(decoder=True)
    kinds = getattr(own, "layer_types", None)
    if getattr(own, "sliding_window", None) is not None and (kinds is None or kinds[-1] == "sliding_attention"):
        raise _unsupported(wrapper, f"its layers have a sliding window of {own.sliding_window}")
    rotary = own.rope_parameters.get("partial_rotary_factor", 1)
    if rotary != 1:  # which transformers' Llama does not read, and vLLM does
        raise _unsupported(wrapper, f"its partial_rotary_factor is {rotary}")
    scale = getattr(layer.self_attn, "scaling", None)
    if scale is not None and abs(scale - config.head_dim**-0.5) > 1e-6:
        raise _unsupported(wrapper, f"its attention is scaled by {scale}")
    unlike = _difference(wrapper, layer, reference.eval(), config)
    if unlike > (1e-4 if weights["mlp.up_proj.weight"].dtype == torch.float32 else 3e-2):
        raise _unsupported(wrapper, f"its layers compute something else, with outputs that differ by {unlike:.1%}")


def _difference(wrapper: ModelWithHeads, layer: nn.Module, reference: nn.Module, config: Qwen2Config) -> float:
    """Return how far the outputs of two layers are apart, in units of the layer's change of its input."""
    causal, S = wrapper.causal, 6
    device = causal.get_input_embeddings().weight.device
    tokens = torch.arange(S, device=device)[None] % config.vocab_size
    x = torch.randn(1, S, config.hidden_size, generator=torch.Generator().manual_seed(0))
    mask = torch.full((1, 1, S, S), torch.finfo(x.dtype).min).triu(1)
    with undisturbed(causal):
        with observed(decoder_layers(causal)[0][-1]) as call:
            causal.base_model(input_ids=tokens, use_cache=False)
        dtype = next(layer.parameters()).dtype
        found = call.repeat(copy.deepcopy(layer).eval(), x.to(device, dtype)).float().cpu()
        rotary = Qwen2RotaryEmbedding(config)(x, torch.arange(S)[None])
        expected = reference(x, attention_mask=mask, position_embeddings=rotary)
    return ((found - expected).norm() / (expected - x).norm()).item()
