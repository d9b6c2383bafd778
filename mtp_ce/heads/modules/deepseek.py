"""Layout "deepseek": modules behind the model's own layers, as DeepSeek-V3, GLM-4-MoE and their kin have them.

    model.layers.{N+k}.enorm, .hnorm, .eh_proj, .shared_head.norm        eh_proj reads [embedding; hidden]
    model.layers.{N+k}.self_attn.*, .mlp.*, ...                          the decoder layer
    model.layers.{N+k}.embed_tokens, .shared_head.head                   copies of the model's own

A further depth reads the hidden state after shared_head.norm in vLLM's deepseek_mtp.py, SGLang's deepseek_nextn.py and
transformers' `MtpModel`, and before it in vLLM's classes of other families.

Source: arXiv:2412.19437, section 2.2; of vLLM 0.32 deepseek_mtp.py, glm4_moe_mtp.py and the like.
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
    passes_normed=True,
    masks_first=True,
    counts=("num_nextn_predict_layers",),
    copies={"embed_tokens": "embed", "shared_head.head": "output"},
    families=("deepseek_v3", "glm4_moe"),
    unnormed=("glm4_moe", "glm4_moe_lite", "glm_ocr_text"),
)
