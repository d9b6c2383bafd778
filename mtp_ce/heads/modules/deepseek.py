"""Layout "deepseek": modules behind the model's own layers, as DeepSeek-V3, GLM-4-MoE and their kin have them.

    model.layers.{N+k}.enorm, .hnorm, .eh_proj, .shared_head.norm        eh_proj reads [embedding; hidden]
    model.layers.{N+k}.self_attn.*, .mlp.*, ...                          the decoder layer
    model.layers.{N+k}.embed_tokens, .shared_head.head                   copies of the model's own

Source: arXiv:2412.19437, section 2.2; vLLM's deepseek_mtp.py and glm4_moe_mtp.py, in which a further depth reads the
hidden state before shared_head.norm.
"""

from mtp_ce.heads.modules.layout import ModuleLayout

LAYOUT = ModuleLayout(
    name="deepseek",
    prefix="model.layers.{layer}.",
    decoder="",
    hidden_norm="hnorm",
    token_norm="enorm",
    projection="eh_proj",
    output_norm="shared_head.norm",
    hidden_first=False,
    passes_normed=False,
    masks_first=True,
    counts=("num_nextn_predict_layers",),
    copies={"embed_tokens": "embed", "shared_head.head": "output"},
)
