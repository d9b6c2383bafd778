"""Layout "medusa": residual heads as a draft model of vLLM, config.json and model.safetensors.

    vllm serve BASE --speculative-config '{"method": "medusa", "model": MEDUSA, "num_speculative_tokens": H - 1}'

vLLM's Medusa has one residual block per draft token on the hidden states that the model's output layer reads, and
drafts the most likely token of each:

    logits_i = logit_scale * (x + SiLU(W_i x + b_i)) U^T        i = 0 .. H-2, x the last hidden state

which is "residual" head i + 1: the token that head 0 predicts is sampled by the model itself. The tensors:

    blocks.{i}.layers.0.weight, .bias    W_i [D, D], b_i [D]    with a bias because medusa_fc_bias is true
    lm_head.weight                       U [V, D]               once for all heads because original_lm_head is true

vLLM 0.32 does not take U from the model that it serves, as it does for MTP modules, so the folder holds it too.
Its reduced vocabulary (truncated_vocab_size with a tensor token_map) does not load: the check of loaded parameters in
default_loader.py refuses the folder, because load_weights does not report token_map as one.

The folders of FasterDecoding/Medusa hold the same blocks under other names ({i}.0.linear.weight) in medusa_lm_head.pt.

Source: arXiv:2401.10774, section 2.1.1. Of vllm-project/vllm: vllm/model_executor/models/medusa.py (tensors),
vllm/transformers_utils/configs/medusa.py (configuration), vllm/v1/spec_decode/medusa.py (calls of the heads).
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from mtp_ce.heads.protocol import ModelWithHeads
from mtp_ce.serving.folders import check_free, describe
from mtp_ce.serving.layouts import Serving
from mtp_ce.unembedding import Unembedding


def export_medusa(wrapper: ModelWithHeads, folder: str | Path) -> Serving:
    """Write "residual" heads as a Medusa draft model, which vLLM serves beside the folder of `export_base`.

    Args:
        wrapper: has "residual" heads; vLLM drafts up to horizon - 1 tokens with them (num_speculative_tokens).
        folder: created where it is missing.

    Returns:
        how vLLM serves it.

    Raises:
        FileExistsError: `folder` holds a model already.
        ValueError: heads of another kind, none beside head 0, or logits that vLLM's Medusa can't compute: with a bias
            or a softcap.
    """
    blocks, output = wrapper.heads.residual_blocks, Unembedding.of(wrapper.causal)
    if not blocks:
        raise ValueError(
            f"wrapper has {describe(wrapper.heads)}; expected 'residual' heads and a horizon above 1, as vLLM's Medusa "
            "has. MTPWrapper(model, horizon, heads='residual') makes them."
        )
    # The most likely token would be the same under a softcap; but the exported logits must be the model's.
    for name, value in (("a bias", output.bias), (f"a softcap of {output.softcap}", output.softcap)):
        if value is not None:
            raise ValueError(
                f"wrapper.model's logits have {name}; expected neither bias nor softcap, which vLLM's Medusa does not "
                "support. MTPWrapper.generate(speculative=True) drafts with these heads."
            )
    from safetensors.torch import save_file

    check_free(folder)
    V, D = output.weight.shape
    tensors = {"lm_head.weight": output.weight}
    for i, block in enumerate(blocks):
        assert isinstance(block, nn.Linear)
        tensors |= {f"blocks.{i}.layers.0.weight": block.weight, f"blocks.{i}.layers.0.bias": block.bias}
    # vLLM takes any key with "num" and "heads" in it as num_heads, so there may be only one.
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": D,
        "vocab_size": V,
        "truncated_vocab_size": V,
        "num_heads": len(blocks),
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
    return Serving("medusa", len(blocks))
