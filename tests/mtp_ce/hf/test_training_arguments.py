"""Every training argument of transformers and TRL is honoured, refused by name, or has no effect on the loss.

A field that a later version adds makes the first test fail, and is then looked at.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)
from transformers.models.llama import modeling_llama

from mtp_ce import MTPWrapper

for package in ("accelerate", "datasets", "peft", "trl"):
    pytest.importorskip(package)

from trl import SFTConfig  # noqa: E402

from mtp_ce import MTPTrainer  # noqa: E402
from mtp_ce.hf import trainer_arguments  # noqa: E402

# Change the loss or what is trained with it, as they do for the model alone; by the test that shows it.
HONOURED = {
    "average_tokens_across_devices": "Trainer's compute_loss, which runs; the count is what the wrapper divides by",
    "gradient_accumulation_steps": "test_token_counts.py",
    "per_device_train_batch_size": "test_token_counts.py",
    "per_device_eval_batch_size": "test_token_counts.py",
    "prediction_loss_only": "test_hf_trainer.py",
    "logging_nan_inf_filter": "test_token_counts.py",
    "neftune_noise_alpha": "below, and test_trl.py",
    "router_aux_loss_coef": "test_trl.py",
    "completion_only_loss": "test_trl.py",
    "assistant_only_loss": "test_trl.py",
    "packing": "test_trl.py",
    "packing_strategy": "test_trl.py",
    "eval_packing": "the collator's, as packing",
    "padding_free": "test_trl.py",
    "max_length": "test_trl.py",
    "truncation_mode": "the data's preparation, as max_length",
    "activation_checkpointing": "test_trl.py",
    "activation_checkpointing_kwargs": "as activation_checkpointing",
    "gradient_checkpointing": "an older name of activation_checkpointing",
    "gradient_checkpointing_kwargs": "an older name of activation_checkpointing_kwargs",
    "activation_offloading": "test_trl.py, on a GPU",
    "torch_compile": "below",
    "torch_compile_backend": "as torch_compile",
    "torch_compile_mode": "as torch_compile",
    "bf16": "below",
    "fp16": "as bf16, on a GPU",
    "bf16_full_eval": "below",
    "fp16_full_eval": "as bf16_full_eval",
    "remove_unused_columns": "keeps parameters of the wrapper's forward, token_weights among them: test_hf_trainer.py",
    "include_num_input_tokens_seen": "below",
    "load_best_model_at_end": "test_hf_trainer.py",
    "resume_from_checkpoint": "test_hf_trainer.py",
    "loss_type": "'nll' and 'chunked_nll', which is the same loss; refused otherwise",
}
# Refused before the first step; liger_kernel_config is read with use_liger_kernel alone.
REFUSED = {
    "label_smoothing_factor", "use_liger_kernel", "liger_kernel_config", "parallelism_config",
}  # fmt: skip
# The optimizer, the order of the data, what is logged, saved and where: not the loss of a batch.
IRRELEVANT = {
    "output_dir", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "optim_target_modules", "max_grad_norm", "tf32", "use_cache", "torch_empty_cache_steps", "auto_find_batch_size",
    "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica",
    "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_do_concat_batches",
    "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
    "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "metric_for_best_model", "greater_is_better", "ignore_data_skip", "restore_callback_states_from_checkpoint",
    "full_determinism", "seed", "data_seed", "use_cpu", "accelerator_config", "dataloader_drop_last",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "label_names", "train_sampling_strategy",
    "length_column_name", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "debug",
    "skip_memory_metrics", "do_train", "do_eval", "do_predict", "local_rank",
    # Of SFTConfig: how the data is made and a model of a name loaded, which a wrapper is not.
    "model_init_kwargs", "trust_remote_code", "chat_template_path", "dataset_text_field", "dataset_kwargs",
    "dataset_num_proc", "eos_token", "shuffle_dataset", "pad_to_multiple_of", "pad_token",
}  # fmt: skip


def test_every_field_is_in_one_of_the_lists():
    fields = {field.name for kind in (TrainingArguments, SFTConfig) for field in dataclasses.fields(kind)}
    assert fields - HONOURED.keys() - REFUSED - IRRELEVANT == set(), "new: does it change a loss?"
    assert not HONOURED.keys() & REFUSED
    assert not (HONOURED.keys() | REFUSED) & IRRELEVANT


V = 61
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS = [{"input_ids": x, "labels": x} for x in torch.randint(V, (8, 12), generator=torch.Generator().manual_seed(0))]


def wrap(horizon: int = 3, kind: str = "residual", **options: Any) -> MTPWrapper:
    torch.manual_seed(0)
    wrapper = MTPWrapper(LlamaForCausalLM(LlamaConfig(**SIZES)), horizon, heads=kind, **options)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return wrapper


def settings(folder: Path, **options: Any) -> TrainingArguments:
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(str(folder), **{**fixed, "max_steps": 2, "per_device_train_batch_size": 4, **options})


def make(
    folder: Path, wrapper: MTPWrapper | None = None, of_trainer: dict[str, Any] | None = None, **options: Any
) -> Any:
    return MTPTrainer(
        model=wrap() if wrapper is None else wrapper, args=settings(folder, **options), train_dataset=ROWS,
        eval_dataset=ROWS, **(of_trainer or {}),
    )  # fmt: skip


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Refused(SimpleNamespace):
    """Arguments of a later or other trainer: whatever they are, the names are those that are read."""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel is True; expected False"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor is 0\.1; expected 0"),
        ({"loss_type": "dft"}, "loss_type is 'dft'; expected 'nll'"),
        ({"loss_type": "sum"}, "loss_type is 'sum'; expected 'nll'"),
    ],
)
def test_what_would_be_another_loss_is_refused_before_anything_is_made_or_patched(options, words, tmp_path):
    """Before the trainer is constructed: a constructor or a first step may patch a class of models for the process."""
    forward, wrapper = modeling_llama.LlamaForCausalLM.forward, wrap()
    arguments = Refused(**{"label_smoothing_factor": 0, "use_liger_kernel": False, **options})
    for given in ((wrapper, arguments), (wrapper,)):
        with pytest.raises(ValueError, match=words):
            MTPTrainer(*given, **({} if len(given) == 2 else {"args": arguments}), train_dataset=ROWS)
    assert modeling_llama.LlamaForCausalLM.forward is forward
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["use_liger_kernel", "label_smoothing_factor"])
def test_real_arguments_are_refused_as_well(option, tmp_path):
    with pytest.raises(ValueError, match=f"{option} is"):
        make(tmp_path, **{option: 0.1 if option == "label_smoothing_factor" else True})


def test_arguments_that_a_constructor_in_between_takes_as_they_come_are_refused_as_well(tmp_path):
    """It has no names for them, so that they are checked once Trainer has them."""

    class Between(MTPTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    class Mixin:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    class Both(MTPTrainer, Mixin, Trainer):
        pass

    for kind in (Between, Both):
        with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1"):
            kind(wrap(), settings(tmp_path, label_smoothing_factor=0.1), train_dataset=ROWS)


def test_the_losses_of_sft_config_are_honoured_or_refused(tmp_path):
    given = {"bf16": False, "use_cpu": True, "report_to": "none"}
    for loss_type in ("nll", "chunked_nll"):
        arguments = SFTConfig(str(tmp_path), loss_type=loss_type, **given)
        MTPTrainer(model=wrap(), args=arguments, train_dataset=ROWS)
    with pytest.raises(ValueError, match="loss_type is 'dft'; expected 'nll': the loss is the wrapper's cross entropy"):
        MTPTrainer(model=wrap(), args=SFTConfig(str(tmp_path), loss_type="dft", **given), train_dataset=ROWS)


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_parts_of_sequences_on_several_ranks_are_refused(name, tmp_path, monkeypatch):
    """A rank's last positions would have fewer heads, in silence; the error names the data that is trained on."""
    parallelism = SimpleNamespace(**{"cp_size": 1, "sp_size": 1, name: 2})
    with pytest.raises(ValueError, match=f"{name} of parallelism_config is 2; expected 1: .* data set of slices"):
        trainer_arguments.check_parallelism(parallelism, 1)
    trainer_arguments.check_parallelism(SimpleNamespace(cp_size=1, sp_size=1), 1)
    checked = []
    monkeypatch.setattr("mtp_ce.hf.trainer.check_parallelism", lambda *given: checked.append(given))
    make(tmp_path)
    assert checked == [(None, TrainingArguments(str(tmp_path), use_cpu=True).n_gpu)]


def test_several_gpus_in_one_process_are_refused():
    with pytest.raises(ValueError, match=r"one process has 2 GPUs, for torch\.nn\.DataParallel"):
        trainer_arguments.check_parallelism(None, 2)


def test_noise_on_embeddings_reaches_the_loss(tmp_path):
    plain, noisy = (losses(make(tmp_path, neftune_noise_alpha=alpha)) for alpha in (None, 50.0))
    assert abs(plain[0] - noisy[0]) > 1e-3


def test_a_compiled_training_is_the_eager_one(tmp_path):
    eager = losses(make(tmp_path))
    assert losses(make(tmp_path, torch_compile=True, torch_compile_backend="eager")) == pytest.approx(eager, rel=1e-5)


def test_bf16_is_autocast_and_a_cast_in_evaluation(tmp_path):
    exact = losses(make(tmp_path))
    rounded = losses(make(tmp_path, bf16=True))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=2e-2)
    evaluated = [make(tmp_path, bf16_full_eval=full).evaluate()["eval_loss"] for full in (False, True)]
    assert evaluated[0] != evaluated[1]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=2e-2)


def test_counts_of_input_tokens_are_trainers_own(tmp_path):
    trainer = make(tmp_path, include_num_input_tokens_seen="all")
    trainer.train()
    seen = [entry["num_input_tokens_seen"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen == [48, 96]


def test_a_trainer_with_predictions_of_its_own_is_refused():
    with pytest.raises(TypeError, match="combines MTPTrainer with Seq2SeqTrainer, whose prediction_step is its own"):
        type("Both", (MTPTrainer, Seq2SeqTrainer), {})


# A learning rate of the heads, and the logs.


def test_heads_have_a_learning_rate_of_their_own(tmp_path):
    """With weight decay and without as Trainer divides them; the schedule scales both alike."""
    trainer = make(tmp_path, of_trainer={"heads_lr": 1e-2}, learning_rate=1e-3, weight_decay=0.1, max_steps=4)
    before = {name: x.clone() for name, x in trainer.model.named_parameters()}
    rates: list[list[float]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            rates.append([group["lr"] for group in trainer.optimizer.param_groups])

    trainer.add_callback(Watch())
    trainer.train()
    heads = {id(x) for x in trainer.model.heads.parameters()}
    groups = trainer.optimizer.param_groups
    for group in groups:
        assert {id(x) in heads for x in group["params"]} == {group["initial_lr"] == 1e-2}
    assert sorted({(group["initial_lr"], group["weight_decay"]) for group in groups}) == [
        (1e-3, 0.0), (1e-3, 0.1), (1e-2, 0.0), (1e-2, 0.1),
    ]  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == len(before)
    assert all(of_heads == pytest.approx(10 * of_trunk) for of_trunk, _, of_heads, _ in rates)
    # Adam's first steps are as large as the rate.
    moved = {name: float((x - before[name]).detach().abs().max()) for name, x in trainer.model.named_parameters()}
    assert moved["heads.blocks.0.weight"] > 5 * moved["model.model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize("trunk", ["joint", "frozen"])
def test_a_resumed_training_with_a_rate_of_the_heads_is_the_uninterrupted_one(trunk, tmp_path):
    options = {"of_trainer": {"heads_lr": 1e-2}, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "whole", wrap(trunk=trunk), max_steps=4, **options)
    whole.train()
    resumed = make(tmp_path / "resumed", wrap(trunk=trunk), max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, x in whole.model.state_dict().items():
        assert torch.equal(x, resumed.model.state_dict()[name]), name
    plain = make(tmp_path / "plain", wrap(trunk=trunk), max_steps=4, learning_rate=1e-3)
    plain.train()
    assert not torch.equal(plain.model.heads.blocks[0].weight, whole.model.heads.blocks[0].weight)


def test_a_checkpoint_without_a_rate_of_the_heads_is_named(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    make(tmp_path, **options).train()
    again = make(tmp_path, of_trainer={"heads_lr": 1e-2}, **options)
    with pytest.raises(
        ValueError, match=r"checkpoint-1 has an optimizer of other parameter groups .*heads_lr is 0\.01"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_rate_of_the_heads_that_nothing_would_read_is_refused(tmp_path):
    for rate in (0, -1e-3, math.inf):
        with pytest.raises(ValueError, match=r"heads_lr is .*; expected a rate above 0"):
            make(tmp_path, of_trainer={"heads_lr": rate})
    wrapper = wrap()
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=r"heads_lr is 0\.1 with an optimizer in optimizers"):
        make(tmp_path, wrapper, {"heads_lr": 0.1, "optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match=r"heads_lr is 0\.1 with heads='teacher_forcing', which have no parameters"):
        make(tmp_path, wrap(kind="teacher_forcing"), {"heads_lr": 0.1})
    of_trunk = {"optimizer_cls_and_kwargs": (TrunkOnly, {"lr": 1e-3})}
    with pytest.raises(ValueError, match=r"heads_lr is 0\.1 with TrunkOnly, without all parameters of the heads"):
        make(tmp_path, of_trainer={"heads_lr": 0.1, **of_trunk}).train()


class TrunkOnly(torch.optim.SGD):
    """An optimizer that leaves parameters out of its groups, as those do that step inside backward."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups[0]["params"][:1], **options)


def test_logs_have_the_means_of_every_head_since_the_last_log(tmp_path):
    """Over micro-batches and steps; those of one forward over the same rows."""
    wrapper = wrap()
    tokens = torch.stack([row["input_ids"] for row in ROWS])
    with torch.no_grad():
        stats = wrapper(tokens, labels=tokens, return_stats=True).stats
    trainer = make(
        tmp_path, wrapper, learning_rate=0.0, max_steps=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=4, logging_steps=2,
    )  # fmt: skip
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    valid = stats.live
    for h in range(3):
        assert entry[f"ce_head_{h}"] == pytest.approx(float(stats.ce[:, :, h].sum() / valid[:, :, h].sum()), rel=1e-5)
    top1 = stats.top1[:, : 12 - 3]
    first = top1[:, :, 1] == stats.top1[:, 1 : 12 - 2, 0]
    both = first & (top1[:, :, 2] == stats.top1[:, 2 : 12 - 1, 0])
    assert entry["agrees_head_2"] == pytest.approx(float(both.float().mean()), abs=1e-6)
    assert 0 < entry["agrees_head_1"] < 1
    evaluation = trainer.evaluate()
    assert {name.removeprefix("eval_") for name in evaluation} >= {"ce_head_0", "ce_head_2", "agrees_head_1"}
    assert evaluation["eval_ce_head_1"] == pytest.approx(entry["ce_head_1"], rel=1e-5)
    json.dumps(trainer.state.log_history)


def test_heads_that_do_not_draft_have_no_agreement(tmp_path):
    trainer = make(tmp_path, wrap(kind="teacher_forcing"))
    trainer.train()
    assert not any(name.startswith("agrees") for entry in trainer.state.log_history for name in entry)


def test_the_next_training_does_not_begin_with_rows_of_the_last(tmp_path):
    """Steps after its last log are in the log at its end."""
    trainer = make(tmp_path, max_steps=3, logging_steps=2)
    trainer.train()
    assert [("ce_head_0" in entry, "train_loss" in entry) for entry in trainer.state.log_history] == [
        (True, False), (True, True),
    ]  # fmt: skip
    assert not trainer._trained._sums


def test_a_pipeline_generates_with_the_models_own_generate():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2", unk_token="0")
    wrapper = wrap().eval()
    options = {"tokenizer": tokenizer, "max_new_tokens": 4, "do_sample": False}
    texts = [pipeline("text-generation", model=model, **options)("3 4 5") for model in (wrapper, wrapper.model)]
    assert texts[0] == texts[1]


def test_the_plain_trainer_trains_all_heads_with_the_same_loss(tmp_path):
    plain = Trainer(model=wrap(), args=settings(tmp_path), train_dataset=ROWS)
    assert losses(plain) == pytest.approx(losses(make(tmp_path)), rel=1e-6)
