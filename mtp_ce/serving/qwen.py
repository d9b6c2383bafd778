"""Layout "qwen": the model with its heads as the MTP module mtp.*, as one folder.

    vllm serve QWEN --speculative-config '{"method": "mtp", "num_speculative_tokens": K}'

For "sequential" heads on Qwen3-Next and Qwen3.5, dense or a mixture, with one module, and for "native" heads.
`mtp_num_hidden_layers` and `num_nextn_predict_layers` are 1; `mtp_ce.heads.modules.qwen` has the names. Engines share
embeddings and output layer with the model, so that the module has neither.

vLLM runs the module at every depth on the normed output of the depth before, and reads the embedding at position 0 as
it is, which "sequential" heads on these models do, too.

Source: of vllm-project/vllm 0.32: qwen3_next_mtp.py and qwen3_5_mtp.py in vllm/model_executor/models.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mtp_ce.heads.modules.qwen import LAYOUT
from mtp_ce.heads.protocol import ModelWithHeads
from mtp_ce.serving.layouts import Serving
from mtp_ce.serving.modules import export_with_module, has_experts


def export_qwen(wrapper: ModelWithHeads, folder: str | Path) -> Serving:
    """Write a Qwen3-Next or Qwen3.5 with its heads as the MTP module; arguments as of `export_with_module`."""
    return export_with_module(wrapper, folder, LAYOUT, _check_layer)


def _check_layer(wrapper: ModelWithHeads, layer: nn.Module) -> None:
    config = wrapper.causal.config.get_text_config(decoder=True)
    name, mixture = type(wrapper.causal).__name__, bool(getattr(config, "num_experts", 0))
    if not any(part.startswith("self_attn.") for part in layer.state_dict()):
        raise ValueError(
            f"wrapper.model is {name} with linear attention in its last layer, and so are those of the heads; expected "
            "full attention, which vLLM's MTP modules of this family have."
        )
    if has_experts(layer) != mixture:
        found, expected = ("a dense", "a mixture of experts") if mixture else ("a mixture as its", "a dense one")
        raise ValueError(
            f"wrapper.model is {name} with {found} last layer, and so are those of the heads; expected {expected}, "
            "which vLLM's MTP module of this model is."
        )
