"""Masked rows cost nothing where their number is known: counted on the host, passed to the loss, no wait for a GPU."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import IterableDataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from mtp_ce import MTPWrapper
from mtp_ce.hf import head_loss
from mtp_ce.ops.chunks import GPU_ROWS

V, B, S = 31, 3, 12
SIZES = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def wrap(heads: str = "residual", horizon: int = 3, **options: Any) -> MTPWrapper:
    torch.manual_seed(0)
    model = MTPWrapper(LlamaForCausalLM(LlamaConfig(**SIZES)), horizon, heads=heads, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


WRAPPERS = {kind: wrap(kind) for kind in ("residual", "layer", "teacher_forcing")}


def batch(seed: int, masked: float = 0.4) -> dict[str, Tensor]:
    """Tokens, and labels of which some are masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (B, S), generator=generator)
    return {"input_ids": tokens, "labels": tokens.masked_fill(torch.rand(B, S, generator=generator) < masked, -100)}


def shifted(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": data["input_ids"],
        "shift_labels": nn.functional.pad(data["labels"][:, 1:], (0, 1), value=-100),
    }


def sparse(*shape: int) -> Tensor:
    """Weights of which every other one is 0."""
    return (torch.arange(math.prod(shape)) % 2).float().view(shape)


# What masks rows beside the labels.
MORE: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "labels": lambda data: data,
    "shift_labels": shifted,
    "shift_labels, weights": lambda data: {**shifted(data), "token_weights": sparse(B, S)},
    "weights": lambda data: {**data, "token_weights": sparse(B, S)},
    "weights of positions": lambda data: {**data, "token_weights": sparse(B, S), "weight_alignment": "position"},
    "weights of heads": lambda data: {**data, "token_weights": sparse(B, S, 3), "weight_alignment": "position"},
    "bools": lambda data: {**data, "token_weights": sparse(B, S).bool()},
    "document_ids": lambda data: {**data, "document_ids": torch.arange(S).expand(B, S) // 5},
    "position_ids": lambda data: {**data, "position_ids": torch.arange(S).expand(B, S) % 5},
    "position_ids of one row": lambda data: {**data, "position_ids": torch.arange(S)[None] % 7},
    "halo": lambda data: {**data, "labels": nn.functional.pad(data["labels"], (0, 1), value=5)},
    "halos": lambda data: {
        **data,
        "labels": nn.functional.pad(data["labels"], (2, 1), value=5),
        "left_halo": 2,
        "token_weights": sparse(B, S + 3),
        "document_ids": torch.arange(S + 3).expand(B, -1) // 5,
    },
    "halo, weights of positions": lambda data: {
        **data,
        "labels": nn.functional.pad(data["labels"], (0, 1), value=5),
        "token_weights": sparse(B, S),
        "weight_alignment": "position",
    },
    "seq_lens": lambda data: {**data, "seq_lens": torch.tensor([S, 3, 0])},
    "ignore_index": lambda data: {**data, "labels": data["labels"].clamp(min=0), "ignore_index": 0},
    "head_reduction": lambda data: {**data, "head_reduction": "live"},
    "num_items": lambda data: {**data, "num_items_in_batch": torch.tensor(7)},
}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([*WRAPPERS]), st.sampled_from([*MORE]), st.sampled_from([0.0, 0.4, 1.0]))
def test_the_count_is_the_number_of_rows_that_the_loss_computes(seed: int, kind: str, more: str, masked: float) -> None:
    """One less is an error on a CPU; and the loss and all gradients are those of rows that the loss has counted."""
    model = WRAPPERS[kind]
    data = MORE[more](batch(seed, masked))
    rows = model.count_rows(**data)
    results = []
    for drop in ({"drop_dead_rows": rows}, {}, {"drop_dead_rows": False}):
        model.zero_grad()
        loss = model(**data, **drop).loss
        loss.backward()
        results.append([loss.detach(), *(x.grad.clone() for x in model.parameters() if x.grad is not None)])
    for passed, counted, all_rows in zip(*results, strict=True):
        assert torch.equal(passed, counted)
        torch.testing.assert_close(passed, all_rows, rtol=1e-4, atol=1e-6)
    if rows:
        with pytest.raises(ValueError, match=f"drop_dead_rows is {rows - 1}, and {rows} rows are live"):
            model(**data, drop_dead_rows=rows - 1)


def test_nothing_is_counted_where_nothing_says_it() -> None:
    """None, which forward takes as "auto": weights from a function or with a gradient, no labels, another loss."""
    model, data = WRAPPERS["residual"], batch(0)
    everything = model.count_rows(**data)
    assert model.count_rows(**data, token_weights=lambda current: torch.zeros(B, S)) == everything
    weights = torch.zeros(B, S, requires_grad=True)
    assert model.count_rows(**data, token_weights=weights) is None
    model(**data, token_weights=weights, drop_dead_rows=None).loss.backward()
    assert weights.grad.abs().sum() > 0
    assert model.count_rows(input_ids=data["input_ids"]) is None
    assert wrap(loss="logits").count_rows(**data) is None
    with pytest.raises(ValueError, match=r"drop_dead_rows is 5 with loss='logits'.*expected none, or loss='linear'"):
        wrap(loss="logits")(**data, drop_dead_rows=5)
    with pytest.raises(ValueError, match="drop_dead_rows is given without labels"):
        model(data["input_ids"], drop_dead_rows=5)
    with pytest.raises(TypeError, match="expected drop_dead_rows"):
        model(**data, drop_dead_row=5)


def test_a_loss_of_ones_own_decides_how_many_rows_it_computes() -> None:
    model = wrap()

    class Twice(type(model.heads)):
        def loss(self, fused, hidden, inputs, options):
            return fused(hidden, inputs, options)

    model.heads.__class__ = Twice
    assert model.count_rows(**batch(0)) is None


def test_heads_that_learn_the_trunks_tokens_take_the_same_count() -> None:
    model, data = wrap(trunk="frozen", targets="trunk"), batch(1)
    rows = model.count_rows(**data)
    assert torch.equal(model(**data, drop_dead_rows=rows).loss, model(**data).loss)
    with pytest.raises(ValueError, match=f"drop_dead_rows is {rows - 1}"):
        model(**data, drop_dead_rows=rows - 1)


def test_a_gpu_pays_for_the_rows_that_are_not_masked_and_is_not_asked_for_their_number() -> None:
    """On fake tensors of a GPU, whose values nobody can read: 40 % of the tokens are a prompt, 60 % are paid for."""
    model = wrap()
    tokens = torch.zeros(8, 100, dtype=torch.int64)
    host = {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(100) < 40, -100)}
    rows = model.row_count._replace(multiple=GPU_ROWS)(host)
    assert rows == -(-8 * 3 * 60 // GPU_ROWS) * GPU_ROWS
    products = []
    with FakeTensorMode():
        fake = {
            name: torch.empty(x.shape, dtype=x.dtype, device="cuda").requires_grad_(x.requires_grad)
            for name, x in [*model.named_parameters(), *model.named_buffers()]
        }
        data = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in host.items()}
        for drop in (rows, None):
            with FlopCounterMode(display=False) as counter:
                torch.func.functional_call(model, fake, (), {**data, "drop_dead_rows": drop})
            flops = counter.get_flop_counts()["Global"]
            products.append(sum(count for name, count in flops.items() if "linear_" in str(name)))
    few, every = products
    assert every == 3 * 2 * 8 * 100 * 3 * V * 8
    assert few == every * rows // (8 * 100 * 3) <= 0.66 * every


def test_a_count_that_changes_compiles_once_more_at_most() -> None:
    """The first as a constant, all others as a number."""
    torch.compiler.reset()
    model = wrap(horizon=2)
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda data, rows: model(**data, drop_dead_rows=rows).loss, fullgraph=True, backend=counter
    )
    seen = set()
    for seed in range(4):
        data = batch(seed)
        seen.add(rows := model.count_rows(**data))
        torch.testing.assert_close(compiled(data, rows), model(**data).loss)
    assert len(seen) == 4
    assert counter.frame_count <= 2
    torch.compiler.reset()


# Trainers.


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """What the loss gets as drop_dead_rows, and the rows that it has computed, in the order of the calls."""
    calls: list[tuple[Any, int]] = []
    original = head_loss.weighted_mtp_linear_ce

    def record(*arguments: Any, drop_dead_rows: Any, return_stats: bool, **options: Any) -> Any:
        result = original(*arguments, drop_dead_rows=drop_dead_rows, return_stats=True, **options)
        calls.append((drop_dead_rows, int((result.stats.top1 >= 0).sum())))
        return result if return_stats else result.loss

    monkeypatch.setattr(head_loss, "weighted_mtp_linear_ce", record)
    return calls


ROWS = [{name: x[0] for name, x in batch(seed).items()} for seed in range(7)]


def trainer(model: MTPWrapper, folder: Any, rows: Any, **options: Any) -> Any:
    pytest.importorskip("accelerate")
    from mtp_ce import MTPTrainer

    arguments = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no",
        per_device_train_batch_size=2, per_device_eval_batch_size=3, learning_rate=1e-2, max_steps=2, **options,
    )  # fmt: skip
    return MTPTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("heads", ["residual", "teacher_forcing"])
def test_trainer_passes_the_count_of_every_micro_batch_and_in_evaluation(heads, tmp_path, passed) -> None:
    """Accumulated micro-batches, the last one of which is smaller; weights in a column, of which some are 0."""
    rows = [{**row, "token_weights": sparse(S) * (1 + i)} for i, row in enumerate(ROWS)]
    model = wrap(heads)
    first = trainer(model, tmp_path, rows, gradient_accumulation_steps=3)
    first.train()
    trained, evaluated = len(passed), first.evaluate()
    predicted = first.predict(rows)
    assert trained == 4  # two steps: three micro-batches, and the one that is left
    assert len(passed) == trained + 3 + 3
    assert all(type(drop) is int and drop == computed for drop, computed in passed)
    assert len({drop for drop, _ in passed}) > 3
    assert predicted.predictions.shape == (7, S, V)

    other = wrap(heads)
    second = trainer(other, tmp_path, rows, gradient_accumulation_steps=3)
    second._counting = lambda loader: loader
    del passed[:]
    second.train()
    assert second.evaluate()["eval_loss"] == evaluated["eval_loss"]
    assert {drop for drop, _ in passed} == {"auto"}
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


class Stream(IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        return iter(ROWS)


def test_trainer_counts_nothing_where_batches_are_cut_after_they_are_collated(tmp_path, passed) -> None:
    """accelerate dispatches the batches of such data, tensors alone, from the first rank."""
    trainer(wrap(), tmp_path, Stream()).train()
    assert {drop for drop, _ in passed} == {"auto"}


def test_a_batch_keeps_the_count_that_it_comes_with_and_workers_hold_no_model(tmp_path, passed) -> None:
    first = trainer(wrap(), tmp_path, ROWS, dataloader_num_workers=1)
    collate = first.get_train_dataloader().base_dataloader.collate_fn
    assert len(pickle.dumps(collate.count_rows)) < 1000
    assert collate(ROWS[:2])["drop_dead_rows"] == sum(
        first.model.count_rows(labels=row["labels"][None]) for row in ROWS[:2]
    )
    first.data_collator = lambda rows: {**collate.collate(rows), "drop_dead_rows": 3 * 2 * S}
    first.train()
    assert {drop for drop, _ in passed} == {3 * 2 * S}
