"""Layout "mimo": modules beside a dense model, as MiMo has them.

    model.mtp_layers.{k}.hidden_layernorm, .token_layernorm, .input_proj, .final_layernorm    input_proj reads
    model.mtp_layers.{k}.self_attn.*, .mlp.*, ...                                             [hidden; embedding]

Source: vLLM's mimo_mtp.py.
"""

from mtp_ce.heads.modules.layout import ModuleLayout

LAYOUT = ModuleLayout(
    name="mimo",
    prefix="model.mtp_layers.{k}.",
    decoder="",
    hidden_norm="hidden_layernorm",
    token_norm="token_layernorm",
    projection="input_proj",
    output_norm="final_layernorm",
    hidden_first=True,
    passes_normed=True,
    masks_first=True,
    counts=("num_nextn_predict_layers",),
)
