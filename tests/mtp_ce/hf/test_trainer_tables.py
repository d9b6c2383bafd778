"""The table of trainers in docs/heads.md: every cell is run.

A cell names what happens, or says "no: " with words of the error; an empty cell has nothing to run, since the trainer
refuses the wrapper when it is made. The table of SFTTrainer's data is run by test_trl.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from mtp_ce import MTPWrapper

# The suite of a GPU machine may be without them.
for package in ("accelerate", "datasets", "peft", "trl"):
    pytest.importorskip(package)

from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from mtp_ce import MTPTrainer  # noqa: E402

V = 31
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "pad_token_id": 2, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
CHECKPOINTING = next(  # transformers renames it in 5.23
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in SFTConfig.__dataclass_fields__
)


class MultiTokenSFT(MTPTrainer, SFTTrainer):
    pass


TRAINERS = {
    "`transformers.Trainer`": Trainer, "`MTPTrainer`": MTPTrainer, "TRL's `SFTTrainer`": SFTTrainer,
    "`MTPTrainer, SFTTrainer`": MultiTokenSFT,
}  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Eight rows of twelve tokens, of which 2, 3, 4, ... are supervised: means of means are no means over tokens."""
    tokens = torch.randint(3, V, (8, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(12) >= 10 - torch.arange(8)[:, None], tokens, -100)
    return [{"input_ids": x.tolist(), "labels": y.tolist()} for x, y in zip(tokens, labels, strict=True)]


def wrap(adapters: bool = False, **options: Any) -> MTPWrapper:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2))
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    return MTPWrapper(model, 3, **options)


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2", unk_token="0")


def make(
    kind: Any, folder: Path, wrapper: MTPWrapper | None = None, data: Any = None, of_trainer: Any = None, **options: Any
) -> Any:
    """A trainer for two steps of four rows each, with a checkpoint after each."""
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 1,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, **options,
    }  # fmt: skip
    data = rows() if data is None else data
    more: dict[str, Any] = dict(of_trainer or {})
    if issubclass(kind, SFTTrainer):
        settings = {"bf16": False, CHECKPOINTING: False, **settings}
        more["processing_class"] = tokenizer()
        data = data if isinstance(data, Dataset) else Dataset.from_list(data)
    arguments = (SFTConfig if issubclass(kind, SFTTrainer) else TrainingArguments)(str(folder), **settings)
    return kind(
        model=wrap() if wrapper is None else wrapper, args=arguments, train_dataset=data, eval_dataset=data, **more
    )


def copy(wrapper: MTPWrapper) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in wrapper.state_dict().items()}


def assert_equal(wrapper: MTPWrapper, expected: dict[str, torch.Tensor]) -> None:
    found = wrapper.state_dict()
    assert found.keys() == expected.keys()
    assert not [name for name, x in found.items() if not torch.equal(x, expected[name])]


def moves_every_head(kind: Any, folder: Path) -> None:
    trainer = make(kind, folder)
    before = copy(trainer.model)
    trainer.train()
    still = {name for name, x in trainer.model.state_dict().items() if torch.equal(x, before[name])}
    assert not still


def evaluated(kind: Any, folder: Path, size: int) -> float:
    return make(kind, folder, per_device_eval_batch_size=size).evaluate()["eval_loss"]


def a_mean_of_means(kind: Any, folder: Path) -> None:
    wrapper, data = wrap().eval(), rows()
    with torch.no_grad():
        each = [wrapper(torch.tensor([x["input_ids"]]), labels=torch.tensor([x["labels"]])).loss for x in data]
    assert evaluated(kind, folder, 1) == pytest.approx(float(sum(each) / len(each)), rel=1e-5)
    assert evaluated(kind, folder, 1) != pytest.approx(evaluated(kind, folder, 8), rel=1e-3)


def a_mean_over_tokens(kind: Any, folder: Path) -> None:
    wrapper, data = wrap().eval(), rows()
    with torch.no_grad():
        tokens, labels = (torch.tensor([row[name] for row in data]) for name in ("input_ids", "labels"))
        expected = float(wrapper(tokens, labels=labels).loss)
    for size in (1, 3, 8):
        assert evaluated(kind, folder, size) == pytest.approx(expected, rel=1e-5)


def no_predictions(kind: Any, folder: Path) -> None:
    assert not make(kind, folder).predict(rows()).predictions


def predicts_the_models_logits(kind: Any, folder: Path) -> None:
    trainer = make(kind, folder)
    found = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)
    with torch.no_grad():
        expected = trainer.model.eval()(torch.tensor([row["input_ids"] for row in rows()])).logits
    torch.testing.assert_close(found, expected)


def saves(kind: Any, folder: Path) -> None:
    trainer = make(kind, folder / "out")
    trainer.save_model(str(folder / "saved"))
    assert_equal(MTPWrapper.from_pretrained(folder / "saved"), copy(trainer.model))


def resumes(kind: Any, folder: Path) -> None:
    for adapters in (False, True):
        whole = make(kind, folder / f"{adapters}", wrap(adapters))
        whole.train()
        resumed = make(kind, folder / "again", wrap(adapters))
        resumed.train(resume_from_checkpoint=str(folder / f"{adapters}" / "checkpoint-1"))
        assert_equal(resumed.model, copy(whole.model))


def loads_the_best(kind: Any, folder: Path) -> None:
    class FirstIsBest(kind):
        def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
            return {**super().evaluate(*arguments, **more), "eval_step": self.state.global_step}

    options = {"load_best_model_at_end": True, "metric_for_best_model": "step", "greater_is_better": False}
    for adapters in (False, True):
        trainer = make(
            FirstIsBest, folder / f"{adapters}", wrap(adapters), eval_strategy="steps", eval_steps=1, **options
        )
        trainer.train()
        first = make(kind, folder / "first", wrap(adapters))
        first._load_from_checkpoint(str(folder / f"{adapters}" / "checkpoint-1"))
        assert_equal(trainer.model, copy(first.model))


def heads_have_a_rate(kind: Any, folder: Path) -> None:
    trainer = make(kind, folder, of_trainer={"heads_lr": 0.5})
    trainer.create_optimizer()
    heads = {id(x) for x in trainer.model.heads.parameters()}
    for group in trainer.optimizer.param_groups:
        assert {id(x) in heads for x in group["params"]} == {group["lr"] == 0.5}


def logged(kind: Any, folder: Path) -> set[str]:
    trainer = make(kind, folder)
    trainer.train()
    return set(trainer.state.log_history[0])


HEADS = {"ce_head_0", "ce_head_1", "ce_head_2", "agrees_head_1", "agrees_head_2"}
OF_TRL = {"mean_token_accuracy", "entropy", "num_tokens"}


def logs(*names: str) -> Callable[[Any, Path], None]:
    def run(kind: Any, folder: Path) -> None:
        assert logged(kind, folder) & (HEADS | OF_TRL | {"loss"}) == {"loss", *names}

    return run


def weights_are_a_column(kind: Any, folder: Path) -> None:
    weighted = [{**row, "token_weights": [3.0] * 12} for row in rows()]
    plain, tripled = (make(kind, folder, data=data).evaluate()["eval_loss"] for data in (rows(), weighted))
    assert tripled == pytest.approx(3 * plain, rel=1e-5)


def trains(**options: Any) -> Callable[[Any, Path], None]:
    def run(kind: Any, folder: Path) -> None:
        make(kind, folder, **options).train()

    return run


def several_gpus(kind: Any, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
        make(kind, folder)


def patches_the_model(kind: Any, folder: Path) -> None:
    """What transformers' Trainer does in `train`, whatever the model is."""

    class Patched(Exception):
        pass

    def apply(model: Any, _: Any) -> None:
        raise Patched

    trainer = make(kind, folder, use_liger_kernel=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.trainer.apply_liger_kernel", apply)
        with pytest.raises(Patched):
            trainer.train()


BOTH = "model, adapters, heads"
OWN_LOSS = {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()}
# What each row's cells say, and how it is shown. The first is what a cell with "no" refuses.
Run = Callable[[Any, Path], None]
PROOFS: dict[str, dict[str, Run]] = {
    "trains all heads": {"yes": moves_every_head},
    "`eval_loss`": {"mean of the batches' means": a_mean_of_means, "mean over tokens": a_mean_over_tokens},
    "predictions for `compute_metrics`": {"none": no_predictions, "logits of head 0": predicts_the_models_logits},
    "saves model and heads": {"yes": saves},
    "`resume_from_checkpoint`": {BOTH: resumes},
    "`load_best_model_at_end`": {BOTH: loads_the_best},
    "`heads_lr`: a learning rate of the heads": {"yes": heads_have_a_rate},
    "logs": {
        "loss": logs(), "loss and every head": logs(*HEADS), "loss, every head, and TRL's own": logs(*HEADS, *OF_TRL),
    },
    "`token_weights` as a column of the data": {"yes": weights_are_a_column},
    "`label_smoothing_factor`": {"yes": trains(label_smoothing_factor=0.1)},
    "`compute_loss_func`": {"yes": trains(of_trainer=OWN_LOSS)},
    "`use_liger_kernel`": {"not checked": patches_the_model},
    "several GPUs in one process": {"not checked": several_gpus},
}  # fmt: skip


def check_cell(cell: str, proofs: dict[str, Run], kind: Any, folder: Path) -> None:
    says, _, words = cell.partition(": ")
    if says != "no":
        proofs[cell](kind, folder)
        return
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        next(iter(proofs.values()))(kind, folder)


@pytest.mark.page_table("trainers")
def test_trainers_do_what_the_page_says(row, column, cell, tmp_path):
    if cell:
        check_cell(cell, PROOFS[row], TRAINERS[column], tmp_path)
        return
    with pytest.raises(TypeError, match="model is MTPWrapper in a trainer of TRL"):
        make(TRAINERS[column], tmp_path)


def test_the_page_has_every_trainer_and_option(page_table):
    assert {row for row, _, _ in page_table("trainers")} == set(PROOFS)
    assert {column for _, column, _ in page_table("trainers")} == set(TRAINERS)
