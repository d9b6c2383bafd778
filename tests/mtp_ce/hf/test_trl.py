"""TRL's trainers: all forms of SFTTrainer's data with the wrapper's loss and TRL's own metrics; the others refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from mtp_ce import MTPWrapper

# The suite of a GPU machine may be without them.
for package in ("accelerate", "datasets", "peft", "trl"):
    pytest.importorskip(package)

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOTrainer,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from mtp_ce import MTPTrainer  # noqa: E402

# TRL turns it on by default; transformers renames it in 5.23.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in SFTConfig.__dataclass_fields__
)
V = 61
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "pad_token_id": 2, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '4 ' if m.role == 'user' else '5 ' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' 1 ' }}{% endgeneration %}"
    "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
)


class MultiTokenSFT(MTPTrainer, SFTTrainer):
    pass


def wrap(horizon: int = 4, kind: str = "residual", uniform: bool = False, **options: Any) -> MTPWrapper:
    torch.manual_seed(0)
    wrapper = MTPWrapper(LlamaForCausalLM(LlamaConfig(**SIZES)), horizon, heads=kind, **options)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if uniform:
            wrapper.get_output_embeddings().weight.zero_()
    return wrapper


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2", unk_token="0")
    fast.chat_template = TEMPLATE
    return fast


def words(*counts: int) -> list[str]:
    """Texts of as many words."""
    generator = torch.Generator().manual_seed(0)
    return [" ".join(map(str, torch.randint(6, V, (n,), generator=generator).tolist())) for n in counts]


COMMON = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_steps": 1}
LENGTHS = (1, 9, 3, 1, 5, 2, 14, 1)
TEXTS = Dataset.from_dict({"text": words(5, 9, 3, 12, 5, 8, 14, 7)})
COMPLETIONS = Dataset.from_dict({"prompt": words(*[6] * 8), "completion": words(*LENGTHS)})
CHATS = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": question}, {"role": "assistant", "content": answer},
                {"role": "user", "content": answer}, {"role": "assistant", "content": question},
            ]
        }
        for question, answer in zip(words(*[4] * 8), words(*LENGTHS), strict=True)
    ]
)  # fmt: skip


def sft(kind: type, model: Any, folder: Any, data: Dataset, **options: Any) -> Any:
    settings = {
        "learning_rate": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 2, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no",
        CHECKPOINTING: False, **options,
    }  # fmt: skip
    return kind(
        model=model, args=SFTConfig(str(folder), **settings), train_dataset=data, eval_dataset=data,
        processing_class=tokenizer(),
    )  # fmt: skip


def logged(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


DATA: dict[str, tuple[Dataset, dict[str, Any]]] = {
    "text": (TEXTS, {}),
    "completions": (COMPLETIONS, {}),
    "whole text of completions": (COMPLETIONS, {"completion_only_loss": False}),
    "chats": (CHATS, {}),
    "answers of chats": (CHATS, {"assistant_only_loss": True}),
    "packed": (COMPLETIONS, {"packing": True, "packing_strategy": "bfd", "max_length": 24}),
    "packed, split": (COMPLETIONS, {"packing": True, "packing_strategy": "bfd_split", "max_length": 9}),
    "packed, cut anywhere": (COMPLETIONS, {"packing": True, "packing_strategy": "wrapped", "max_length": 10}),
    "packed chats": (CHATS, {"assistant_only_loss": True, "packing": True, "max_length": 40}),
    "padding-free": (COMPLETIONS, {"padding_free": True, "max_length": None}),
    "truncated": (COMPLETIONS, {"max_length": 10}),
    "noisy embeddings": (COMPLETIONS, {"neftune_noise_alpha": 5.0}),
    "chunked": (COMPLETIONS, {"loss_type": "chunked_nll"}),
    "checkpointed": (CHATS, {"assistant_only_loss": True, CHECKPOINTING: True}),
}
if torch.cuda.is_available():  # TRL offloads through a stream of the GPU
    DATA["offloaded"] = (COMPLETIONS, {"activation_offloading": True})


@pytest.mark.parametrize("data", DATA)
def test_every_form_of_data_has_a_loss_of_ln_vocabulary_under_a_uniform_model(data, tmp_path):
    """Whatever is masked, packed and accumulated, the coefficients of all rows sum to 1."""
    rows, options = DATA[data]
    trainer = sft(
        MultiTokenSFT,
        wrap(uniform=True),
        tmp_path,
        rows,
        gradient_accumulation_steps=2,
        eval_strategy="epoch",
        **options,
    )
    trainer.train()
    entries = [entry for entry in logged(trainer) if "ce_head_0" in entry]
    assert entries
    # Packing leaves steps without a target.
    assert all(entry["loss"] == 0 for entry in logged(trainer) if entry not in entries)
    for entry in entries:
        assert entry["loss"] == pytest.approx(math.log(V), rel=1e-5)
        assert entry["entropy"] == pytest.approx(math.log(V), rel=1e-5)
        assert [entry[f"ce_head_{h}"] for h in range(4)] == pytest.approx([math.log(V)] * 4, rel=1e-5)
    (evaluation,) = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert evaluation["eval_loss"] == pytest.approx(math.log(V), rel=1e-5)


@pytest.mark.parametrize(
    "data", ["text", "completions", "answers of chats", "packed", "packed, cut anywhere", "padding-free"]
)
def test_one_head_is_trls_own_training(data, tmp_path):
    """Losses, gradients and all of TRL's metrics, which SFTTrainer itself logs for the model alone."""
    rows, options = DATA[data]
    options = {**options, "learning_rate": 1e-2, "eval_strategy": "epoch"}
    ours = sft(MultiTokenSFT, wrap(1, "none"), tmp_path, rows, **options)
    theirs = sft(SFTTrainer, wrap(1, "none").model, tmp_path, rows, **options)
    for trainer in (ours, theirs):
        trainer.train()
    assert len(logged(ours)) == len(logged(theirs)) > 1
    for one, other in zip(logged(ours), logged(theirs), strict=True):
        names = ["loss", "grad_norm", "num_tokens", "learning_rate"]
        if one["loss"] != 0:  # a step without a target has no mean here, and 0 there
            names += ["entropy", "mean_token_accuracy"]
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    of_evaluation = [
        next(entry for entry in trainer.state.log_history if "eval_loss" in entry) for trainer in (ours, theirs)
    ]
    assert of_evaluation[1].keys() <= of_evaluation[0].keys()
    assert of_evaluation[0]["eval_num_tokens"] == of_evaluation[1]["eval_num_tokens"]


def small_mixture(kind: str) -> MTPWrapper:
    torch.manual_seed(0)
    return MTPWrapper(
        MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)), 2, heads=kind
    )


# The rows of the table of SFTTrainer's data in docs/heads.md: names of DATA, which the first test trains on, or a call.
SHOWN: dict[str, list[str] | Callable[[Any], Any]] = {
    "text, prompt and completion, chats": ["text", "completions", "whole text of completions", "chats"],
    "`assistant_only_loss`, `completion_only_loss`": ["answers of chats", "completions"],
    "a completion that is truncated away": ["truncated"],
    "`packing` with `bfd`, `bfd_split` and `wrapped`, `padding_free`": [
        "packed", "packed chats", "packed, split", "packed, cut anywhere", "padding-free",
    ],
    '`loss_type="nll"` and `"chunked_nll"`': ["completions", "chunked"],
    '`loss_type="dft"`': lambda folder: sft(MultiTokenSFT, wrap(), folder, TEXTS, loss_type="dft"),
    "`neftune_noise_alpha`, activation checkpointing": ["noisy embeddings", "checkpointed"],
    "`router_aux_loss_coef`": lambda folder: sft(
        MultiTokenSFT, small_mixture("residual"), folder, TEXTS, router_aux_loss_coef=0.5, max_steps=1
    ).train(),
    "`router_aux_loss_coef` with heads that are decoder layers": lambda folder: sft(
        MultiTokenSFT, small_mixture("layer"), folder, TEXTS, router_aux_loss_coef=0.5
    ),
    "`peft_config`": lambda folder: MultiTokenSFT(
        model=wrap(), args=SFTConfig(str(folder), **COMMON), train_dataset=TEXTS, processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    ),
}  # fmt: skip


def test_the_page_has_every_row_and_all_data(page_table):
    assert {row for row, _, _ in page_table("sft")} == set(SHOWN)
    assert {name for names in SHOWN.values() if isinstance(names, list) for name in names} == set(DATA) - {"offloaded"}


@pytest.mark.page_table("sft")
def test_the_page_says_which_data_trains(row, column, cell, tmp_path):
    """ "yes" trains, by the test above or here; "no" is refused with the words that follow it."""
    says, _, words = cell.partition(": ")
    shown = SHOWN[row]
    if says == "no":
        assert callable(shown)
        with pytest.raises(ValueError, match=re.escape(words)):
            shown(tmp_path)
        return
    assert cell.partition("; ")[0] == "yes"
    if callable(shown):
        shown(tmp_path)


def test_metrics_of_tokens_are_means_over_all_micro_batches_since_the_last_log(tmp_path):
    """Of answers of different lengths, in one log of all rows: those of the whole data in one batch."""
    runs = []
    for batch, accumulated in ((8, 1), (1, 8), (2, 4)):
        trainer = sft(
            MultiTokenSFT, wrap(), tmp_path, COMPLETIONS, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        trainer.train()
        (entry,) = logged(trainer)
        runs.append({name: x for name, x in entry.items() if name not in ("grad_norm", "epoch", "step")})
    assert {"ce_head_3", "agrees_head_3", "entropy", "mean_token_accuracy", "num_tokens"} <= runs[0].keys()
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=1e-5)


def test_the_routers_coefficient_is_the_one_of_the_configuration(tmp_path):
    """SFTTrainer writes it into the model's configuration; transformers' models read an attribute of their own."""
    losses, balances = [], []
    for coefficient in (0.0, 0.5, 2.0):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))
        trainer = sft(
            MultiTokenSFT, MTPWrapper(model, 2), tmp_path, COMPLETIONS, router_aux_loss_coef=coefficient,
            gradient_accumulation_steps=4,
        )  # fmt: skip
        trainer.train()
        losses.append(logged(trainer)[0]["loss"])
        balances.append(logged(trainer)[0].get("aux_loss"))
    assert balances[0] is None
    assert balances[1] == pytest.approx(balances[2])
    assert losses[1] - losses[0] == pytest.approx(0.5 * balances[1], rel=1e-3)
    assert losses[2] - losses[0] == pytest.approx(2.0 * balances[1], rel=1e-3)


def test_routers_of_the_heads_are_refused_before_the_first_step(tmp_path):
    """SFTTrainer turns the routers' loss on for every mixture."""
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))
    wrapper = MTPWrapper(model, 2, heads="layer")
    with pytest.raises(ValueError, match=r"expected heads='residual', or SFTConfig\(router_aux_loss_coef=0\.0\)"):
        sft(MultiTokenSFT, wrapper, tmp_path, COMPLETIONS)
    model.config.output_router_logits = False
    sft(MultiTokenSFT, wrapper, tmp_path, COMPLETIONS, router_aux_loss_coef=0.0).train()


def test_a_column_of_weights_that_the_collator_would_drop_is_refused(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 4, "token_weights": [[1.0, 1.0, 2.0]] * 4})
    with pytest.raises(ValueError, match="train_dataset has a column token_weights, which SFTTrainer removes"):
        sft(MultiTokenSFT, wrap(), tmp_path, rows)


def test_adapters_around_the_wrapper_are_refused_before_they_are_made(tmp_path):
    wrapper = wrap()
    names = [name for name, _ in wrapper.named_parameters()]
    with pytest.raises(ValueError, match=r"peft_config is given; .*MTPWrapper\(get_peft_model\(model, peft_config\)"):
        MultiTokenSFT(
            model=wrapper, args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=TEXTS,
            processing_class=tokenizer(), peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        )  # fmt: skip
    assert [name for name, _ in wrapper.named_parameters()] == names


PREFERENCES = Dataset.from_list([{"prompt": "6 7", "chosen": "8 9", "rejected": "10 11"}] * 4)


def test_trainers_of_trl_that_compute_their_own_loss_refuse_the_wrapper_when_they_are_made(tmp_path):
    words = r"model is MTPWrapper in a trainer of TRL .*class T\(MTPTrainer, SFTTrainer\).*model=wrapper\.model"
    with pytest.raises(TypeError, match=words):
        sft(SFTTrainer, wrap(), tmp_path, TEXTS)
    with pytest.raises(TypeError, match=words):
        DPOTrainer(
            model=wrap(), ref_model=wrap().model, args=DPOConfig(str(tmp_path), **COMMON), train_dataset=PREFERENCES,
            processing_class=tokenizer(),
        )  # fmt: skip
    with pytest.raises(TypeError, match=words):
        GRPOTrainer(
            model=wrap(), reward_funcs=lambda completions, **_: [1.0] * len(completions),
            args=GRPOConfig(str(tmp_path), num_generations=2, per_device_train_batch_size=2, **COMMON),
            train_dataset=PREFERENCES.select_columns(["prompt"]), processing_class=tokenizer(),
        )  # fmt: skip


def test_what_they_are_told_to_use_instead_trains_and_the_heads_follow(tmp_path):
    """DPO on the model inside, then the heads on it, detached."""
    wrapper = wrap()
    DPOTrainer(
        model=wrapper.model, ref_model=wrap().model, train_dataset=PREFERENCES, processing_class=tokenizer(),
        args=DPOConfig(str(tmp_path), **COMMON, per_device_train_batch_size=2, **{CHECKPOINTING: False}),
    ).train()  # fmt: skip
    further = MTPWrapper(wrapper.model, 4, trunk="detached")
    before = {name: x.clone() for name, x in further.named_parameters()}
    sft(MultiTokenSFT, further, tmp_path, TEXTS, max_steps=1, learning_rate=1e-2).train()
    moved = {name for name, x in further.named_parameters() if not torch.equal(x, before[name])}
    assert moved
    assert all(name.startswith("heads.") for name in moved)


@pytest.mark.parametrize("other", [DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer])
def test_a_class_of_mtp_trainer_and_one_with_its_own_loss_is_refused(other):
    with pytest.raises(TypeError, match=rf"combines MTPTrainer with {other.__name__}, whose \w+ is its own"):
        type("Both", (MTPTrainer, other), {})


def test_the_wrong_order_of_bases_is_refused():
    words = r"Both has SFTTrainer before MTPTrainer, .*expected class Both\(MTPTrainer, SFTTrainer\)"
    with pytest.raises(TypeError, match=words):
        type("Both", (SFTTrainer, MTPTrainer), {})

    class Custom(SFTTrainer):
        def compute_loss(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(TypeError, match="combines MTPTrainer with Custom, whose compute_loss is its own"):
        type("Both", (MTPTrainer, Custom), {})

    class Mixed(MultiTokenSFT):  # a loss of the user's own, on top
        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            return super().compute_loss(*arguments, **options)

    assert issubclass(Mixed, MTPTrainer)
