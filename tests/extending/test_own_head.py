"""A head kind from outside the package: one file, and its class path in the recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mtp_ce import MTPWrapper
from mtp_ce.decoding.speculative import generate_speculatively
from mtp_ce.training.cli.train import main

OWN_HEADS = '''
import torch
from torch import nn

from mtp_ce.heads.protocol import Heads


class ScaledHeads(Heads):
    """Head h reads the hidden state times a vector of its own."""

    def __init__(self, hidden_size, horizon):
        super().__init__(hidden_size, horizon)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(hidden_size)) for _ in range(horizon - 1))

    def forward(self, hidden, trunk=None):
        return [hidden, *(hidden * scale for scale in self.scales)]


class OneTooFew(ScaledHeads):
    def forward(self, hidden, trunk=None):
        return super().forward(hidden)[1:]


class NotHeads:
    pass
'''
KIND = "own_heads:ScaledHeads"
RECIPE = [
    "tiny", f"model.mtp.kind={KIND}", "model.mtp.horizon=3", "model.layers=1", "model.hidden_size=16",
    "model.intermediate_size=16", "model.attention_heads=2", "model.kv_heads=2", "data.vocab_size=300",
    "data.sequence_length=32", "data.holdout_fraction=0.5", "optimizer.warmup_steps=1", "train.steps=3",
    "train.device=cpu", "train.batch_size=2", "validation.every=null", "validation.rows=2",
    "validation.decoding={prompts: 1, prompt_tokens: 4, new_tokens: 8}", "tracking.kind=none",
]  # fmt: skip


@pytest.fixture
def own_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_heads.py").write_text(OWN_HEADS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for name in "abcdefgh":
        (tmp_path / "text" / f"{name}.py").write_text("".join(f"{name}{i} = {name} + {i}\n" for i in range(60)))


@pytest.mark.usefixtures("own_heads")
def test_a_head_kind_from_outside_trains_drafts_and_is_loaded_again(tmp_path):
    assert main([*RECIPE, "data.corpus=text", "--output", "run"]) == 0
    saved = json.loads((tmp_path / "run" / "model" / "mtp_heads.json").read_text())
    assert saved == {"kind": KIND, "hidden_size": 16, "horizon": 3}
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert len(evaluation["heads"]) == 3
    assert evaluation["decoding"]["identical"] == 1, "its heads draft, and the text is the model's own"

    wrapper = MTPWrapper.from_pretrained(tmp_path / "run" / "model").eval()
    assert (wrapper.kind, wrapper.horizon) == (KIND, 3)
    assert all(not torch.equal(scale, torch.ones(16)) for scale in wrapper.heads.parameters()), "three steps moved it"
    assert generate_speculatively(wrapper, torch.tensor([[5, 6, 7]]), max_new_tokens=4).speculation.tokens <= 4

    # The saved heads are trained further by a recipe that names the same class.
    further = [word for word in RECIPE if not word.startswith(("model.", "data.vocab_size", "tiny"))]
    source = ["smollm2", "model.source=run", f"model.mtp.kind={KIND}", "model.mtp.horizon=3", "model.mtp.trunk=frozen"]
    assert main([*source, *further, "data.corpus=text", "--output", "further"]) == 0
    longer = MTPWrapper.from_pretrained(tmp_path / "further" / "model")
    assert all(torch.equal(x, y) for x, y in zip(longer.model.parameters(), wrapper.model.parameters(), strict=True))


@pytest.mark.usefixtures("own_heads")
def test_heads_that_forget_head_0_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    wrapper = MTPWrapper(LlamaForCausalLM(LlamaConfig(vocab_size=5, **sizes)), 3, heads="own_heads:OneTooFew")
    tokens = torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="returned 2 tensors; expected 3, head 0's hidden state first"):
        wrapper(tokens, labels=tokens)


@pytest.mark.usefixtures("own_heads")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("residul", "model.mtp.kind: kind is 'residul'; expected one of 'residual', "),
        ("own_heads:Missing", "model.mtp.kind is 'own_heads:Missing', which can't be loaded"),
        ("own_heads:NotHeads", "model.mtp.kind is 'own_heads:NotHeads'; expected a subclass of mtp_ce.heads.protocol"),
    ],
)
def test_a_wrong_head_kind_is_one_line_of_the_dry_run_too(kind, words, capsys):
    assert main([*RECIPE, f"model.mtp.kind={kind}", "data.corpus=text", "--dry-run"]) == 2
    complained = capsys.readouterr().err
    assert words in complained
    assert complained.count("\n") == 1
