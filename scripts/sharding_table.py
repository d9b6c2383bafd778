"""Print the table of docs/many_gpus.md: bytes of a GPU for two models, on 8 and 64 GPUs, from shapes alone.

    python scripts/sharding_table.py

Memory is what `train-mtp --dry-run` prints. Received in a step, by a GPU, with d data ranks and groups of t that share
the layers, one row of T tokens a GPU, t rows a group, one after the other:

    FSDP     t * 8 P / t * (d - 1) / d                     P parameters: 2 bytes in each pass, 4 of gradient
    sums     t * (4 L + 1 + H) * 2 T D * 2 (t - 1) / t     of hidden states in L layers and the embedding, H gradients
    loss     t * 12 T H * (t - 1)                          3 numbers of every row from each other rank
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper
from mtp_ce.training.models.build import checkpoint_activations
from mtp_ce.training.models.sizing import step_memory
from mtp_ce.training.models.tensor_parallel import keep_share

VOCABULARY, TOKENS, HORIZON = 128_256, 8192, 4
LLAMAS = {
    "Llama 3 8B": LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=TOKENS,
    ),
    "Llama 3 70B": LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=TOKENS,
    ),
}  # fmt: skip
HEADER = (
    "| | data ranks x shared | state | gathered | activations | loss | in all | FSDP | sums | loss |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def row(name: str, gpus: int, shared: int) -> str:
    """Return a line of the table."""
    config = LLAMAS[name]
    with torch.device("meta"):
        model = MTPWrapper(LlamaForCausalLM(config), horizon=HORIZON, heads="residual")
    checkpoint_activations(model)
    if shared > 1:
        keep_share(model, shared)
    ranks = gpus // shared
    memory, _ = step_memory(model, [], 1, TOKENS, torch.device("cuda"), ranks, dtype=torch.bfloat16)
    state = memory.weights + memory.gradients + memory.optimizer
    held = sum(x.numel() for x in model.parameters())
    fsdp = shared * 8 * held * (ranks - 1) / ranks
    states = 4 * config.num_hidden_layers + 1 + HORIZON
    sums = shared * states * 2 * TOKENS * config.hidden_size * 2 * (shared - 1) / shared
    loss = shared * 12 * TOKENS * HORIZON * (shared - 1)
    sizes = (state, memory.gathered, memory.activations, memory.loss, memory.total, fsdp, sums, loss)
    cells = (f"{size / 1e9:.{2 if size < 1e8 else 1}f}" if size else "0" for size in sizes)
    return f"| {name}, {gpus} GPUs | {ranks} x {shared} | {' | '.join(cells)} |"


def table(names: Iterable[str] = LLAMAS) -> str:
    """Return the table, in Markdown, GB."""
    return "\n".join([HEADER, *(row(*case) for case in product(names, (8, 64), (1, 8)))])


if __name__ == "__main__":
    print(table())
