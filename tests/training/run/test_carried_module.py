"""train-mtp on a checkpoint with an MTP module of its own: the saved model has it, and so has the exported base.

It is carried over as it was, or trained: model.mtp.kind=native.
"""

from __future__ import annotations

import json
import re
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from mtp_ce.training.cli import export
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.metrics.acceptance import measure_acceptance
from mtp_ce.training.run import fitting, pipeline
from mtp_ce.training.run.dry_run import dry_run
from mtp_ce.training.run.evaluate import load_checkpoint
from mtp_ce.training.run.inputs import read_inputs

MODULE = {"model.layers.2.eh_proj.weight": torch.randn(8, 16), "model.layers.2.enorm.weight": torch.randn(8).bfloat16()}
SIZES = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 4,
    "num_key_value_heads": 1, "moe_intermediate_size": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip


def assert_carried(folder, *, stale):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert (index["metadata"].get("mtp_module") == "stale") == stale
    for name, x in MODULE.items():
        saved = load_file(folder / index["weight_map"][name])[name]
        assert saved.dtype == x.dtype
        assert torch.equal(saved, x)
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_a_run_keeps_the_module_of_its_source(small, tmp_path, monkeypatch):
    """Also where the source is removed before the model is saved: the run is refused by name, and resumes."""
    quiet = Console(quiet=True)
    source, output = tmp_path / "source", tmp_path / "run"
    Glm4MoeForCausalLM(Glm4MoeConfig(vocab_size=512, **SIZES)).save_pretrained(source)
    save_file(load_file(source / "model.safetensors") | MODULE, source / "model.safetensors", metadata={"format": "pt"})
    read_inputs(small(), quiet).tokenizer.save_pretrained(source)
    model = f"model={{kind: pretrained, source: {source}, mtp: {{horizon: 2, trunk: detached}}}}"
    recipe = small([model, "data.vocab_size=null", "train.steps=2", "optimizer.warmup_steps=0"])

    class Removing(fitting.Trainer):
        def fit(self):
            results = super().fit()
            source.rename(tmp_path / "moved")
            return results

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "Trainer", Removing)
        with pytest.raises(RecipeError, match=f"model.source '{source}' was removed during training"):
            pipeline.train(recipe, output, quiet)
    (tmp_path / "moved").rename(source)
    pipeline.train(recipe, output, quiet, resume=True)
    assert_carried(output / "model", stale=False)
    assert export.main([str(output), "base", str(tmp_path / "base")]) == 0
    assert_carried(tmp_path / "base", stale=False)
    model = load_checkpoint("base", tmp_path / "base", printed := Console(file=StringIO(), width=400))
    assert model.kind == "none"
    assert "warning: the MTP module of CHECKPOINT is not measured: " in printed.file.getvalue()


def tensors_of(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {name: x for file in set(index["weight_map"].values()) for name, x in load_file(folder / file).items()}


def test_a_run_trains_the_module_of_its_source(small, tmp_path):
    """Under the names it had, in the run's model, in the exported base, and in a run that starts from the first one."""
    quiet, source = Console(quiet=True), tmp_path / "source"
    Glm4MoeForCausalLM(Glm4MoeConfig(vocab_size=512, **SIZES)).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    layer = {name: x for name, x in tensors.items() if name.startswith("model.layers.1.")}
    module = {name.replace(".1.", ".2.", 1): x.clone() for name, x in layer.items()}
    module |= {f"model.layers.2.{name}.weight": torch.ones(8) for name in ("enorm", "hnorm", "shared_head.norm")}
    module["model.layers.2.eh_proj.weight"] = 0.1 * torch.randn(8, 16)
    save_file(tensors | module, source / "model.safetensors", metadata={"format": "pt"})
    read_inputs(small(), quiet).tokenizer.save_pretrained(source)

    def recipe(source):
        model = f"model={{kind: pretrained, source: {source}, mtp: {{kind: native, horizon: 3, trunk: detached}}}}"
        return small([model, "data.vocab_size=null", "train.steps=2", "optimizer.warmup_steps=0"])

    dry_run(recipe(source), tmp_path / "none", shown := Console(file=StringIO(), width=200))
    assert re.search(r"extra heads \d{3,}", shown.file.getvalue().replace(",", ""))
    before = tensors | module
    for start, output in ((source, tmp_path / "first"), (tmp_path / "first", tmp_path / "second")):
        pipeline.train(recipe(start), output, quiet)
        after = tensors_of(output / "model")
        assert after.keys() == before.keys()
        assert all(torch.equal(x, before[name]) for name, x in after.items() if name in tensors)
        assert not torch.equal(after["model.layers.2.eh_proj.weight"], before["model.layers.2.eh_proj.weight"])
        before = after
    assert export.main([str(tmp_path / "second"), "base", str(tmp_path / "base")]) == 0
    # It has no files but those of the model; eval-mtp measures its own module.
    model = load_checkpoint("base", tmp_path / "base").eval()
    assert (model.kind, model.horizon) == ("native", 2)
    (counts,) = measure_acceptance(model, [[1, 2, 3]], new_tokens=6, draft_tokens=3)
    assert len(counts.accepted) == 3
    base = tensors_of(tmp_path / "base")
    assert base.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in base.items())
    assert export.main([str(tmp_path / "second"), "heads", str(tmp_path / "heads")]) == 2
