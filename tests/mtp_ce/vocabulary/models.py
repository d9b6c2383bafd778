"""Scenarios of ranks.py with models of transformers, whose import the others are spared."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from mtp_ce import MTPWrapper

V, D = 67, 16  # not divisible by the ranks
SIZES = {"hidden_size": D, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4}


def config(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(vocab_size=V, num_hidden_layers=2, tie_word_embeddings=tied, **SIZES)


def batch(rows: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (rows, 12), generator=generator)
    labels = tokens.clone()
    labels[0, :5] = -100
    return {"input_ids": tokens, "labels": labels, "token_weights": torch.rand(rows, 12, generator=generator)}


def wrapped(model: nn.Module, **options: Any) -> MTPWrapper:
    torch.manual_seed(2)
    wrapper = MTPWrapper(model, horizon=3, **options)
    with torch.no_grad():
        for parameter in wrapper.heads.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return wrapper


def model(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config(tied))


def sharded(causal: LlamaForCausalLM, mesh: Any) -> None:
    """Embedding, attention, MLP and output layer over the ranks, as torchtitan's plan has them."""
    layers = {"self_attn.q_proj": ColwiseParallel(), "self_attn.k_proj": ColwiseParallel()}
    layers |= {"self_attn.v_proj": ColwiseParallel(), "self_attn.o_proj": RowwiseParallel()}
    layers |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    tied = causal.lm_head.weight is causal.model.embed_tokens.weight
    plan = {f"layers.*.{name}": style for name, style in layers.items()}
    parallelize_module(
        causal, mesh,
        {f"model.{name}": style for name, style in plan.items()}
        | {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate()), "lm_head": ColwiseParallel()},
    )  # fmt: skip
    if tied:
        causal.lm_head.weight = causal.model.embed_tokens.weight


def step(wrapper: MTPWrapper, **options: Any) -> dict[str, Any]:
    """Loss, statistics and whole gradients of one step."""
    output = wrapper(**batch(), return_stats=True, **options)
    output.loss.backward()
    gradients = {
        name.replace("_checkpoint_wrapped_module.", ""): whole(x.grad)
        for name, x in wrapper.named_parameters()
        if x.grad is not None
    }
    return {"loss": output.loss.detach(), "logits": getattr(output, "logits", None), "gradients": gradients}


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


SCENARIOS: dict[str, Callable[[Any], Any]] = {}


def scenario(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    SCENARIOS[function.__name__] = function
    return function


KINDS: dict[str, dict[str, Any]] = {
    "residual": {"heads": "residual"}, "sequential": {"heads": "sequential"},
    "logits": {"heads": "residual", "loss": "logits"}, "layer": {"heads": "layer"},
}  # fmt: skip


@scenario
def parallelized(ranks: Any) -> Any:
    """A model that parallelize_module shards after it is wrapped, beside one process; and one with tied embeddings."""
    found = {}
    for name, options in KINDS.items():
        for tied in (False, True) if name == "residual" else (False,):
            alone, shared = (wrapped(model(tied), **options) for _ in range(2))
            sharded(shared.causal, ranks.mesh)
            found[name, tied] = step(alone), step(shared)
    return found


@scenario
def loaded(ranks: Any) -> Any:
    """A folder that transformers loads with its own plan, wrapped after that."""
    os.environ |= {"RANK": str(ranks.rank), "LOCAL_RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.ranks)}
    folder = Path(ranks.folder) / "saved"
    if ranks.rank == 0:
        model().save_pretrained(folder)
    torch.distributed.barrier()
    alone = wrapped(LlamaForCausalLM.from_pretrained(folder))
    plan = DistributedConfig(tp_size=ranks.ranks)
    shared = wrapped(LlamaForCausalLM.from_pretrained(folder, distributed_config=plan))
    placement = str(shared.causal.lm_head.weight.placements)
    return {"placement": placement, "steps": (step(alone), step(shared))}


@scenario
def two_dimensions(ranks: Any) -> Any:
    """FSDP2 around a model that is sharded over the second dimension of a mesh; each data-parallel rank has a row."""
    tp = min(2, ranks.ranks)
    mesh = init_device_mesh("cpu", (ranks.ranks // tp, tp), mesh_dim_names=("dp", "tp"))
    alone, shared = (wrapped(model()) for _ in range(2))
    sharded(shared.causal, mesh["tp"])
    for layer in shared.causal.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(shared, mesh=mesh["dp"])
    size = mesh["dp"].size()
    mine = slice(mesh["dp"].get_local_rank(), None, size)
    count = torch.tensor(1.0)
    outcomes = []
    for wrapper, rows, scale in ((alone, slice(None), 1), (shared, mine, size)):
        inputs = {name: x[rows] for name, x in batch().items()}
        loss = wrapper(**inputs, num_items_in_batch=count).loss
        (loss * scale).backward()
        gradients = {name: whole(x.grad) for name, x in wrapper.named_parameters() if x.grad is not None}
        outcomes.append({"loss": loss.detach(), "gradients": gradients})
    total = outcomes[1]["loss"].clone()
    torch.distributed.all_reduce(total, group=mesh["dp"].get_group())
    outcomes[1]["loss"] = total
    return {"placements": str(shared.causal.lm_head.weight.placements), "steps": outcomes}


@scenario
def other_calls(ranks: Any) -> Any:
    """Logits, drafts and entropy of a sharded model are whole on every rank."""
    alone, shared = (wrapped(model()).eval() for _ in range(2))
    sharded(shared.causal, ranks.mesh)
    tokens = batch()["input_ids"]
    found = {}
    with torch.no_grad():
        for name, wrapper in (("alone", alone), ("shared", shared)):
            output = wrapper(**batch(), return_logits=True, return_entropy=True)
            found[name] = [output.logits, output.entropy, *wrapper.head_logits(input_ids=tokens)]
            options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
            found[name].append(wrapper.generate(tokens[:1], speculative=True, **options))
    return found
