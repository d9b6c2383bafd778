"""Trainers of Hugging Face: what they save they load, model and heads, and the loss is the wrapper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from mtp_ce import MTPWrapper

# The suite of a GPU machine may be without them.
for package in ("accelerate", "datasets", "peft", "trl"):
    pytest.importorskip(package)

from mtp_ce import MTPTrainer  # noqa: E402

V = 61
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(V, (count, 16), generator=generator)
    return [{"input_ids": row, "labels": row} for row in drawn]


LEARNT, HELD_OUT = rows(32, 1), rows(8, 2)


def build(folder: Path, made: str = "plain", **options: Any) -> MTPWrapper:
    """A wrapper of one of the ways in which a model comes."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=made == "tied"))
    if made == "experts":
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, output_router_logits=True))
    if made in ("adapters", "reloaded adapters"):
        from peft import LoraConfig, get_peft_model

        model.save_pretrained(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    wrapper = MTPWrapper(model, 3, **{"heads": "sequential" if made == "sequential" else "residual", **options})
    if made == "reloaded adapters":
        wrapper.save_pretrained(folder / "wrapped")
        return MTPWrapper.from_pretrained(folder / "wrapped", **options)
    return wrapper


def train(kind: Any, model: MTPWrapper, output: Path, steps: int = 8, **settings: Any) -> Any:
    arguments = TrainingArguments(
        str(output),
        **{
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 4,
            "report_to": "none",
            "use_cpu": True,
            "seed": 0,
            "disable_tqdm": True,
            **settings,
        },
    )
    return kind(model=model, args=arguments, train_dataset=LEARNT, eval_dataset=HELD_OUT)


def parameters(model: MTPWrapper) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


MADE = ["plain", "tied", "sequential", "adapters", "reloaded adapters"]


@pytest.mark.parametrize("trunk", ["joint", "frozen"])
@pytest.mark.parametrize("made", MADE)
def test_a_resumed_training_is_the_uninterrupted_one(made, trunk, tmp_path):
    """Every parameter and every loss to the last bit."""
    whole = train(MTPTrainer, build(tmp_path, made, trunk=trunk), tmp_path / "whole")
    whole.train()
    resumed = train(MTPTrainer, build(tmp_path, made, trunk=trunk), tmp_path / "resumed")
    wanting = {name for name, x in resumed.model.named_parameters() if x.requires_grad}
    start = parameters(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same(parameters(whole.model), parameters(resumed.model))
    assert not same(start, parameters(resumed.model))
    losses = [[x["loss"] for x in trainer.state.log_history if "loss" in x] for trainer in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    assert {name for name, x in resumed.model.named_parameters() if x.requires_grad} == wanting


class SecondIsBest(MTPTrainer):
    """The checkpoint of step 8 is the best, whatever the losses are on this machine."""

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        metrics = super().evaluate(*arguments, **options)
        return {**metrics, "eval_distance": abs(self.state.global_step - 8)}


@pytest.mark.parametrize("made", MADE)
def test_the_best_model_at_the_end_is_the_best_one(made, tmp_path):
    """Neither the first checkpoint nor the last: loss and heads are those of the best."""
    trainer = train(
        SecondIsBest, build(tmp_path, made), tmp_path / "out", steps=12, eval_steps=4, eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="distance", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-8")
    _, best_loss, last_loss = (entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert last_loss != pytest.approx(best_loss, rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best_loss, rel=1e-6)
    best = MTPWrapper.from_pretrained(trainer.state.best_model_checkpoint)
    for name, x in best.heads.state_dict().items():
        assert torch.equal(x, trainer.model.heads.state_dict()[name]), name


def test_a_model_in_several_files_is_resumed(tmp_path):
    wrapper = build(tmp_path)
    wrapper.model.save_pretrained(tmp_path / "checkpoint", max_shard_size="8KB")
    wrapper.heads.save_pretrained(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "model.safetensors.index.json").exists()
    wanted = parameters(wrapper)
    trainer = train(MTPTrainer, wrapper, tmp_path / "out")
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.zero_()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))
    assert same(parameters(wrapper), wanted)


def test_a_checkpoint_of_other_heads_is_refused(tmp_path):
    build(tmp_path, "sequential").save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "trainer_state.json").write_text("{}")
    trainer = train(MTPTrainer, build(tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match=r"3 heads of the kind 'sequential'; expected 3 of the kind 'residual'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint"))
    (tmp_path / "checkpoint" / "mtp_heads.json").unlink()
    with pytest.raises(ValueError, match=r"is no complete checkpoint: .* has no mtp_heads\.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint"))


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_checkpoints_are_left_to_trainer(sharded, tmp_path, monkeypatch):
    """They have the wrapper's own names, and are loaded into the module that shards it."""
    trainer, calls = train(MTPTrainer, build(tmp_path), tmp_path / "out"), []
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda _, *given: calls.append(given))
    monkeypatch.setattr(Trainer, "_load_best_model", lambda _: calls.append("best"))
    setattr(trainer, sharded, True)
    trainer._load_from_checkpoint("folder", trainer.model)
    trainer._load_best_model()
    assert calls == [("folder", trainer.model), "best"]


def test_a_trainer_that_would_load_nothing_says_so(tmp_path):
    """The plain one reads model.safetensors into the wrapper, whose parameters have other names."""
    train(Trainer, build(tmp_path), tmp_path / "out").train()
    trainer = train(Trainer, build(tmp_path), tmp_path / "again")
    with pytest.raises(ValueError, match="MTPTrainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))


@pytest.mark.parametrize("kind", [Trainer, MTPTrainer])
def test_evaluation_gives_the_loss(kind, tmp_path):
    """With arguments that do not mention labels, as for a model of transformers itself."""
    trainer = train(kind, build(tmp_path), tmp_path / "out")
    assert trainer.label_names == ["labels"]
    tokens = torch.stack([row["input_ids"] for row in HELD_OUT])
    with torch.no_grad():
        expected = trainer.model.eval()(tokens, labels=tokens, num_items_in_batch=8 * 15).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_one_head_is_trained_as_the_model_alone(tmp_path):
    """The count of targets that the trainer hands over is that of a causal language model."""
    torch.manual_seed(0)
    alone = LlamaForCausalLM(LlamaConfig(**SIZES))
    losses = []
    for model in (alone, MTPWrapper(LlamaForCausalLM.from_pretrained(_saved(alone, tmp_path)), 1, heads="none")):
        trainer = train(Trainer, model, tmp_path / "out", gradient_accumulation_steps=2, steps=3)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder / "alone")
    return folder / "alone"


@pytest.mark.parametrize("made", ["plain", "experts"])
def test_predictions_are_the_next_token_heads(tmp_path, made):
    trainer = train(MTPTrainer, build(tmp_path, made), tmp_path / "out")
    tokens = torch.stack([row["input_ids"] for row in HELD_OUT])
    predicted = trainer.predict(HELD_OUT)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(predicted.predictions), trainer.model.eval()(tokens).logits)
    assert predicted.metrics["test_loss"] > 0


@pytest.mark.parametrize("kind", [Trainer, MTPTrainer])
def test_weights_that_are_a_column_of_the_data_weigh_the_loss(kind, tmp_path):
    trainer = train(kind, build(tmp_path), tmp_path / "out")
    weighted = [{**row, "token_weights": torch.full((16,), 3.0)} for row in HELD_OUT]
    assert trainer.evaluate(weighted)["eval_loss"] == pytest.approx(3 * trainer.evaluate()["eval_loss"], rel=1e-5)


def test_a_loss_that_would_train_no_head_is_refused(tmp_path):
    """Both remove the labels and use the logits of the model alone; the plain trainer fails at once."""
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1; .*MTPWrapper\(label_smoothing=0\.1\)"):
        train(MTPTrainer, build(tmp_path), tmp_path / "out", label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"num_items_in_batch is given without labels; .*label_smoothing_factor"):
        train(Trainer, build(tmp_path), tmp_path / "out", label_smoothing_factor=0.1).train()
    own = {
        "args": TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True),
        "train_dataset": LEARNT,
        "compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(),
    }
    with pytest.raises(ValueError, match="compute_loss_func is given"):
        MTPTrainer(model=build(tmp_path), **own)
    with pytest.raises(ValueError, match=r"num_items_in_batch is given without labels; .*compute_loss_func"):
        Trainer(model=build(tmp_path), **own).train()


def test_a_model_that_is_no_wrapper_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    around = get_peft_model(build(tmp_path), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="model is PeftModel; expected MTPWrapper"):
        train(MTPTrainer, around, tmp_path / "out")


@pytest.mark.parametrize("made", ["plain", "adapters"])
def test_trls_trainer_resumes_and_trains_all_heads(made, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class SFT(MTPTrainer, SFTTrainer):
        pass

    # TRL turns it on by default; transformers renames it in 5.23.
    names = ("activation_checkpointing", "gradient_checkpointing")
    checkpointing = next(name for name in names if name in SFTConfig.__dataclass_fields__)

    def trainer(output: str) -> Any:
        settings = SFTConfig(
            str(tmp_path / output), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
            logging_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, eval_strategy="steps",
            eval_steps=2, **{checkpointing: False},
        )  # fmt: skip
        learnt, held_out = (
            Dataset.from_list(
                [{"input_ids": row["input_ids"].tolist(), "labels": row["input_ids"].tolist()} for row in part]
            )
            for part in (LEARNT, HELD_OUT)
        )
        return SFT(
            model=build(tmp_path, made), args=settings, train_dataset=learnt, eval_dataset=held_out,
            processing_class=tokenizer(tmp_path),
        )  # fmt: skip

    whole, resumed = trainer("whole"), trainer("resumed")
    heads = {name: x.clone() for name, x in whole.model.heads.state_dict().items()}
    whole.train()
    assert all(not torch.equal(x, heads[name]) for name, x in whole.model.heads.state_dict().items())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(parameters(whole.model), parameters(resumed.model))
    assert [x["eval_loss"] for x in whole.state.log_history if "eval_loss" in x] == [
        x["eval_loss"] for x in resumed.state.log_history if "eval_loss" in x
    ]


def tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2", unk_token="0")
