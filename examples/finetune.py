"""Multi-token heads on a model that Hugging Face's own trainers train: transformers.Trainer, or TRL's SFTTrainer.

    python examples/finetune.py                                          a tiny random Llama, no network
    python examples/finetune.py --trainer trl --accumulation 4
    python examples/finetune.py --steps 40 --resume runs/finetune/checkpoint-20
    python examples/finetune.py --model HuggingFaceTB/SmolLM2-135M --heads sequential --trunk frozen

The text is the Python standard library's own source. Accumulated micro-batches give the loss of one large batch:
both trainers hand the count of the whole batch to the model, and the wrapper divides by it. `MTPTrainer` makes either
trainer load what it saves of a wrapper: to go on from a checkpoint, and to end with the best one on held-out text.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

from mtp_ce import MTPTrainer, MTPWrapper
from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.corpus import texts
from mtp_ce.training.data.reader import read_corpus
from mtp_ce.training.data.tokenizer import load_tokenizer


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, and give the loss of every step."""
    options = _parser().parse_args(argv)
    torch.manual_seed(0)
    corpus = read_corpus(DataConfig())
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        tokenizer = load_tokenizer(texts(corpus.train), 8192)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            )
        )  # fmt: skip
    wrapper = MTPWrapper(model, options.horizon, heads=options.heads, trunk=options.trunk)

    ids = list(chain.from_iterable(tokenizer(list(texts(corpus.train[:40])))["input_ids"]))
    rows = [ids[i : i + options.length] for i in range(0, len(ids) - options.length, options.length)]
    held_out, learnt = (Dataset.from_dict({"input_ids": part, "labels": part}) for part in (rows[:16], rows[16:]))

    settings: dict[str, Any] = {
        "output_dir": options.output,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size // options.accumulation,
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": options.lr,
        "logging_steps": 1,
        "save_steps": options.save_steps,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": options.save_steps,
        "load_best_model_at_end": True,
        "report_to": "none",
        "seed": 0,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
    }
    data = {"train_dataset": learnt, "eval_dataset": held_out}
    trainer: MTPTrainer
    if options.trainer == "trl":
        from trl import SFTConfig, SFTTrainer

        class MultiTokenSFTTrainer(MTPTrainer, SFTTrainer):
            pass

        arguments = SFTConfig(**settings, max_length=options.length, activation_checkpointing=False)
        trainer = MultiTokenSFTTrainer(model=wrapper, args=arguments, processing_class=tokenizer, **data)
    else:
        trainer = MTPTrainer(model=wrapper, args=TrainingArguments(**settings), **data)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    print(f"{trainer.state.best_model_checkpoint} is the best of them, and is what {options.output} has;")
    print("MTPWrapper.from_pretrained and AutoModelForCausalLM.from_pretrained both load it")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal language model; none: a tiny random Llama")
    parser.add_argument("--trainer", choices=["transformers", "trl"], default="transformers")
    parser.add_argument("--heads", choices=["teacher_forcing", "residual", "layer", "sequential"], default="residual")
    parser.add_argument("--trunk", choices=["joint", "detached", "frozen"], default="joint")
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="steps in all")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per optimizer step")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches that the rows come in")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save-steps", type=int, default=20, help="steps between checkpoints, each evaluated")
    parser.add_argument("--resume", help="checkpoint folder to go on from")
    parser.add_argument("--output", default="runs/finetune")
    return parser


if __name__ == "__main__":
    main()
