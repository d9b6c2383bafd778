"""Scenarios of test_context_parallel.py: every rank holds slices of a sequence, and attention gathers keys and values.

A slice is a row of the batch. In the contiguous layout a rank has one slice of every sequence; in zig-zag two, one from
each end, so that its batch is twice as large.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, TrainingArguments, default_data_collator

from mtp_ce import MTPTrainer, MTPWrapper

V, B, L = 31, 2, 16
SIZES = {
    "vocab_size": V, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
# Over four ranks of 4 positions: one; borders on those of the ranks; one from the first rank to the last, and one from
# the first to the third; documents that come back; documents of one token.
DOCUMENTS = {
    "one": [[0] * 16] * 2,
    "cut_at_every_rank": [[0] * 4 + [1] * 4 + [2] * 4 + [3] * 4] * 2,
    "over_three_ranks": [[0] * 3 + [1] * 10 + [2] * 3, [0] * 9 + [1] + [2] * 6],
    "coming_back": [[0, 0, 0, 1, 0, 1, 1, 0, 2, 0, 0, 2, 2, 1, 1, 1]] * 2,
    "of_one_token": [[*range(16)], [0] * 16],
}


class AllGather(torch.autograd.Function):
    """The tensors [N, ...] of all ranks, [ranks N, ...]; backward adds up what the ranks have as their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        every = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(every, x.contiguous())
        return every

    @staticmethod
    def backward(ctx: Any, d_every: Tensor) -> Tensor:
        d_x = d_every.new_empty(len(d_every) // dist.get_world_size(), *d_every.shape[1:])
        dist.reduce_scatter_tensor(d_x, d_every.contiguous())
        return d_x


def gathered(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of this rank's positions to those of all ranks: queries [C B, heads, n, d], mask [C B, 1, n, L]."""
    pieces = attention_mask.shape[-1] // key.shape[2]
    slices = pieces // dist.get_world_size()

    pairs = torch.cat([key, value], -1)  # [C B, heads, n, 2 d] -> [B, heads, L, 2 d], in the order of `order_of_keys`
    whole = torch.cat(AllGather.apply(pairs).chunk(pieces), 2).repeat(slices, 1, 1, 1)
    output = F.scaled_dot_product_attention(
        query, *whole.chunk(2, -1), attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("gathered", gathered)


def starts_of(layout: str, rank: int, ranks: int) -> tuple[list[int], int]:
    """First positions of a rank's slices, and their length."""
    if layout == "contiguous":
        return [rank * L // ranks], L // ranks
    return [rank * L // (2 * ranks), (2 * ranks - 1 - rank) * L // (2 * ranks)], L // (2 * ranks)


def order_of_keys(layout: str, ranks: int) -> Tensor:
    """Positions [L] of the keys that `gathered` puts together."""
    found = [starts_of(layout, rank, ranks) for rank in range(ranks)]
    return torch.cat([torch.arange(start, start + n) for starts, n in found for start in starts])


def draw(documents: str, masked: slice, seed: int = 1) -> SimpleNamespace:
    """Whole sequences, every token of a weight."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (B, L), generator=generator)
    labels = tokens.clone()
    labels[:, masked] = -100
    ids = torch.tensor(DOCUMENTS[documents])
    earlier = (ids[:, :, None] == ids[:, None, :]).tril(-1)
    return SimpleNamespace(
        tokens=tokens, labels=labels, ids=ids, positions=earlier.sum(-1), weights=torch.rand(B, L, generator=generator),
        attends=earlier | torch.eye(L, dtype=torch.bool),
    )  # fmt: skip


def inputs_of(
    text: SimpleNamespace, starts: list[int], n: int, left: int, halo: int, keys: Tensor, shifted: bool = False
) -> dict[str, Any]:
    """A rank's arguments of the wrapper's forward."""

    def cut(x: Tensor, before: int = 0, after: int = 0, value: int = 0) -> Tensor:
        padded = F.pad(x, (before, after), value=value)
        return torch.cat([padded[:, start : start + before + n + after] for start in starts])

    def cut_labels(x: Tensor, value: int) -> Tensor:
        moved = F.pad(x[:, 1:], (0, 1), value=value) if shifted else x
        return cut(moved, left, halo - shifted, value)

    after = [F.pad(text.tokens, (0, halo))[:, start + n : start + n + halo - 1] for start in starts]
    return {
        "input_ids": cut(text.tokens),
        "position_ids": cut(text.positions),
        "attention_mask": torch.cat([text.attends[:, start : start + n, keys] for start in starts])[:, None],
        "shift_labels" if shifted else "labels": cut_labels(text.labels, -100),
        "document_ids": cut_labels(text.ids, -1),
        "token_weights": cut_labels(text.weights, 0),
        "next_input_ids": torch.cat(after),
        "left_halo": left,
    }


@cache
def build(attention: str, heads: str, H: int, **options: Any) -> MTPWrapper:
    torch.manual_seed(0)
    wrapper = MTPWrapper(LlamaForCausalLM(LlamaConfig(**SIZES)), H, heads=heads, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wrapper.causal.set_attn_implementation(attention)
    return wrapper


def step(wrapper: MTPWrapper, inputs: dict[str, Any]) -> dict[str, Any]:
    """Loss, statistics and the gradient of every parameter, of zeros where there is none."""
    wrapper.zero_grad()
    output = wrapper(**inputs, num_items_in_batch=torch.tensor(7.0), return_stats=True)
    output.loss.backward()
    gradients = {
        name: torch.zeros_like(x) if x.grad is None else x.grad
        for name, x in wrapper.named_parameters()
        if x.requires_grad
    }
    return {"loss": output.loss.detach(), "gradients": gradients, "stats": output.stats._asdict()}


def together(ranks: Any, found: dict[str, Any], layout: str) -> dict[str, Any]:
    """Sums over the ranks, and statistics in the order of the whole."""
    sums = torch.cat([found["loss"].view(1), *(x.flatten() for x in found["gradients"].values())])
    dist.all_reduce(sums)
    loss, *gradients = sums.split([1, *(x.numel() for x in found["gradients"].values())])
    order = order_of_keys(layout, ranks.ranks).argsort()
    rows = torch.stack([x.double() for x in found["stats"].values()], -1)
    parts = rows.new_empty(ranks.ranks * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(parts, rows)
    columns = torch.cat(parts.split(B), 1)[:, order].unbind(-1)
    stats = {name: x.to(like.dtype) for (name, like), x in zip(found["stats"].items(), columns, strict=True)}
    named = zip(found["gradients"].items(), gradients, strict=True)
    return {"loss": loss[0], "stats": stats, "gradients": {name: x.view_as(like) for (name, like), x in named}}


def compare(
    ranks: Any, layout: str, documents: str, heads: str, H: int, masked: slice = slice(5, 8), **options: Any
) -> Any:
    """A step of one process on the whole, where this is the first rank, and of all ranks on their slices."""
    text = draw(documents, masked)
    alone = None
    if ranks.rank == 0:
        whole = inputs_of(text, [0], L, 0, 0, torch.arange(L)) | {"next_input_ids": None}
        alone = step(build("sdpa", heads, H, **options), whole)
    wrapper = build("gathered", heads, H, **options)
    # A slice of "teacher_forcing" predicts the tokens of its own positions, and one.
    left, halo = (0, 1) if heads == "teacher_forcing" else (H - 1, H)
    starts, n = starts_of(layout, ranks.rank, ranks.ranks)
    mine = inputs_of(text, starts, n, left, halo, order_of_keys(layout, ranks.ranks))
    shared = together(ranks, step(wrapper, mine), layout)
    return None if alone is None else (alone, shared)


SCENARIOS: dict[str, Callable[[Any], Any]] = {}


def scenario(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    SCENARIOS[function.__name__] = function
    return function


@scenario
def slices(ranks: Any) -> Any:
    """Any documents in both layouts; with 6 heads all labels of a slice are beyond it."""
    return {
        (layout, documents, heads, H): compare(ranks, layout, documents, heads, H)
        for layout in ("contiguous", "zig_zag")
        for documents in DOCUMENTS
        for heads, H in (("residual", 3), ("sequential", 6))
    }


@scenario
def other_heads(ranks: Any) -> Any:
    """Other kinds, reductions and modes of the wrapper."""
    cases: dict[str, dict[str, Any]] = {
        "layer": {"heads": "layer"},
        "logits": {"heads": "residual", "loss": "logits", "head_reduction": "live"},
        "checkpoints": {"heads": "sequential", "activation_checkpointing": True, "head_reduction": "horizon"},
        "detached": {"heads": "sequential", "trunk": "detached"},
        "frozen": {"heads": "layer", "trunk": "frozen"},
        "none": {"heads": "none"},
        "teacher_forcing": {"heads": "teacher_forcing"},
    }  # fmt: skip
    return {
        name: compare(ranks, "zig_zag", "over_three_ranks", H=1 if name == "none" else 3, **case)
        for name, case in cases.items()
    }


@scenario
def rank_without_targets(ranks: Any) -> Any:
    """The tokens that a rank's positions predict are masked: it has no row, and joins what others send in backward."""
    masked = slice(5, 11)
    return {heads: compare(ranks, "contiguous", "one", heads, 3, masked=masked) for heads in ("residual", "sequential")}


@scenario
def documented(ranks: Any) -> Any:
    """The program of docs/many_gpus.md, on CPUs, beside one process: losses, and the gradients of all parameters."""
    page = (Path(__file__).resolve().parents[3] / "docs/many_gpus.md").read_text(encoding="utf-8")
    section = page.partition("## A sequence that is cut over GPUs")[2]
    names: dict[str, Any] = {}
    exec(section.partition("```python\n")[2].partition("```")[0].replace('"cuda"', '"cpu"'), names)
    model, loss = names["model"], names["loss"].detach()
    dist.all_reduce(loss)
    shared = [x.grad.clone() for x in model.parameters()]
    model.zero_grad()
    model.causal.set_attn_implementation("sdpa")
    whole = model(
        names["text"], position_ids=names["positions"], attention_mask=names["attends"][:, None],
        labels=names["text"], document_ids=names["documents"], num_items_in_batch=names["N"],
    ).loss  # fmt: skip
    whole.backward()
    return [(whole.detach(), loss), *zip([x.grad for x in model.parameters()], shared, strict=True)]


STEPS, ACCUMULATION, RATE = 2, 2, 0.5


@scenario
def trainer(ranks: Any) -> Any:
    """MTPTrainer on a data set of slices, beside plain SGD on the whole."""
    here = {"RANK": ranks.rank, "LOCAL_RANK": ranks.rank, "WORLD_SIZE": ranks.ranks, "LOCAL_WORLD_SIZE": ranks.ranks}
    os.environ.update({name: str(value) for name, value in here.items()})
    cases = (("contiguous", "residual", False), ("zig_zag", "sequential", True))
    return {case: train(ranks, *case) for case in cases}


def train(ranks: Any, layout: str, heads: str, shifted: bool) -> Any:
    H = 3
    documents = "one" if shifted else "over_three_ranks"
    texts = [draw(documents, slice(5, 7 + 2 * seed), seed) for seed in range(STEPS * ACCUMULATION)]
    name = "shift_labels" if shifted else "labels"
    rows: list[dict[str, Tensor]] = []
    keys = order_of_keys(layout, ranks.ranks)
    for text in texts:  # in the order in which accelerate deals out batches
        for rank in range(ranks.ranks):
            starts, n = starts_of(layout, rank, ranks.ranks)
            inputs = inputs_of(text, starts, n, H - 1, H, keys, shifted)
            del inputs["left_halo"]
            rows += [dict(zip(inputs, values, strict=True)) for values in zip(*inputs.values(), strict=True)]
    size = len(starts) * B
    arguments = TrainingArguments(
        str(Path(ranks.folder) / "trainer"), max_steps=STEPS, gradient_accumulation_steps=ACCUMULATION,
        per_device_train_batch_size=size, per_device_eval_batch_size=size, train_sampling_strategy="sequential",
        optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, label_names=[name],
    )  # fmt: skip
    build.cache_clear()
    wrapper = build("gathered", heads, H)
    trained = MTPTrainer(
        model=wrapper, args=arguments, train_dataset=rows, eval_dataset=rows,
        data_collator=lambda features: {**default_data_collator(features), "left_halo": H - 1},
    )  # fmt: skip
    if heads == "residual":  # which must not keep the ranks from adding up their gradients after it
        trained.evaluate()
    trained.train()
    shared: dict[str, Any] = {"eval": trained.evaluate()["eval_loss"]}
    shared |= {"losses": [log["loss"] for log in trained.state.log_history if "loss" in log]}
    shared["ce"] = [log["ce_head_1"] for log in trained.state.log_history if "ce_head_1" in log]
    shared["parameters"] = {x: y.detach() for x, y in wrapper.named_parameters()}
    return None if ranks.rank else (by_hand(texts, build("sdpa", heads, H)), shared)


def by_hand(texts: list[SimpleNamespace], wrapper: MTPWrapper) -> dict[str, Any]:
    """The same numbers from whole sequences in one process."""
    count = [int((text.labels[:, 1:] != -100).sum()) for text in texts]
    found: dict[str, Any] = {"losses": [], "ce": []}

    def run(text: SimpleNamespace, items: int) -> Any:
        inputs = inputs_of(text, [0], L, 0, 0, torch.arange(L)) | {"next_input_ids": None}
        return wrapper(**inputs, num_items_in_batch=items, return_stats=True)

    for step in range(STEPS):
        batch = range(step * ACCUMULATION, (step + 1) * ACCUMULATION)
        wrapper.zero_grad()
        outputs = [run(texts[i], sum(count[j] for j in batch)) for i in batch]
        loss = sum(output.loss for output in outputs)
        loss.backward()
        ce, read = (
            torch.cat([x[:, :, 1] for x in columns])
            for columns in zip(*((output.stats.ce, output.stats.top1 >= 0) for output in outputs), strict=True)
        )
        found["losses"].append(loss.item())
        found["ce"].append(float(ce.sum() / read.sum()))
        with torch.no_grad():
            for parameter in wrapper.parameters():
                parameter -= RATE * (0 if parameter.grad is None else parameter.grad)
    with torch.no_grad():
        found["eval"] = sum(float(run(text, sum(count)).loss) for text in texts)
    return found | {"parameters": {x: y.detach() for x, y in wrapper.named_parameters()}}
