"""Layout "deepseek": the model with its heads as the MTP module behind its layers, as one folder.

    vllm serve DEEPSEEK --speculative-config '{"method": "mtp", "num_speculative_tokens": K}'

For "sequential" heads on DeepSeek-V3 and GLM-4-MoE with one module, and for "native" heads. The module is layer N of
the files, behind the model's layers 0 .. N-1, and `num_nextn_predict_layers` is 1; `mtp_ce.heads.modules.deepseek` has
the names. Engines share embeddings and output layer with the model, so that the module has neither.

vLLM runs the module at every depth. DeepSeek-V3's passes on the hidden state after shared_head.norm, which is what
"sequential" heads are trained on; GLM-4-MoE's passes on the one before it, so that such heads draft one token there.

Source: of vllm-project/vllm 0.32: deepseek_mtp.py and glm4_moe_mtp.py in vllm/model_executor/models.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mtp_ce.heads.modules.deepseek import LAYOUT
from mtp_ce.heads.protocol import ModelWithHeads
from mtp_ce.serving.layouts import Serving
from mtp_ce.serving.modules import export_with_module, has_experts


def export_deepseek(wrapper: ModelWithHeads, folder: str | Path) -> Serving:
    """Write a DeepSeek-V3 or GLM-4-MoE with its heads as the MTP module; arguments as of `export_with_module`."""
    return export_with_module(wrapper, folder, LAYOUT, _check_layer)


def _check_layer(wrapper: ModelWithHeads, layer: nn.Module) -> None:
    if not has_experts(layer):
        raise ValueError(
            f"wrapper.model is {type(wrapper.causal).__name__} with a dense last layer, and so are those of the heads; "
            "expected a mixture of experts, which vLLM's MTP modules of this family are."
        )
