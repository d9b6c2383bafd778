"""Layout "qwen": one module beside the model, as Qwen3-Next, Qwen3.5 and Mellum have it.

    mtp.pre_fc_norm_hidden, mtp.pre_fc_norm_embedding, mtp.fc, mtp.norm        fc reads [embedding; hidden]
    mtp.layers.0.*                                                             the decoder layer

Source: vLLM's qwen3_next_mtp.py and qwen3_5_mtp.py.
"""

from mtp_ce.heads.modules.layout import ModuleLayout

LAYOUT = ModuleLayout(
    name="qwen",
    prefix="mtp.",
    decoder="layers.{k}.",
    hidden_norm="pre_fc_norm_hidden",
    token_norm="pre_fc_norm_embedding",
    projection="fc",
    output_norm="norm",
    hidden_first=False,
    passes_normed=True,
    masks_first=False,
    counts=("mtp_num_hidden_layers", "num_nextn_predict_layers"),
    single=True,
    families=("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
)
