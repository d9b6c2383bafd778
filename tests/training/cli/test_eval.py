"""`eval-mtp`: a checkpoint is measured as at the end of its training, and a mistake costs one line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper
from mtp_ce.decoding.speculative import UncroppableCacheError
from mtp_ce.training.cli import evaluate as cli
from mtp_ce.training.config.recipe import load_evaluation
from mtp_ce.training.config.validation import DecodingConfig
from mtp_ce.training.data.corpus import Document
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.metrics import decoding
from mtp_ce.training.metrics.acceptance import Acceptance, measure_acceptance
from mtp_ce.training.models.sources import find_checkpoint
from mtp_ce.training.run.evaluate import decode, evaluate

QUIET = Console(quiet=True)
SMALL = ["tracking.kind=none", "validation.decoding={prompts: 2, prompt_tokens: 16, new_tokens: 12}"]


@pytest.fixture(scope="module")
def evaluated(finished_run, tmp_path_factory):
    """The finished run, measured again from its files alone, with MLflow."""
    source, made = find_checkpoint(str(finished_run.folder))
    recipe = load_evaluation(made, ["tracking.experiment=evaluation"])
    folder = tmp_path_factory.mktemp("evaluated") / "eval"
    return evaluate(source, recipe, folder, QUIET), folder


def test_a_checkpoint_measures_as_at_the_end_of_its_training(finished_run, evaluated):
    """Bit for bit: the same weights read from files, the same held-out text, the same code."""
    evaluation, _ = evaluated
    assert evaluation.heads == finished_run.evaluation.heads
    assert evaluation.unigram == finished_run.evaluation.unigram
    assert evaluation.decoding.speculation == finished_run.evaluation.decoding.speculation
    assert evaluation.acceptance == finished_run.evaluation.acceptance
    assert evaluation.decoding.identical == evaluation.decoding.prompts == 2
    assert 0 < evaluation.heads[2].agrees <= evaluation.heads[1].agrees < 1


def test_what_is_written_says_what_was_measured(evaluated, finished_run):
    evaluation, folder = evaluated
    found = json.loads((folder / "evaluation.json").read_text())
    assert [head["ce"] for head in found["heads"]] == [head.ce for head in evaluation.heads]
    assert [head["top5"] for head in found["heads"]] == [head.top5 for head in evaluation.heads]
    assert found["tokens_per_forward"] == pytest.approx(sum(head.agrees for head in evaluation.heads))
    assert found["before"] is None
    assert found["decoding"]["prompts"] == 2
    assert found["decoding"]["tokens_per_forward"] == evaluation.decoding.speculation.tokens_per_forward
    assert len(found["decoding"]["acceptance"]) == len(found["decoding"]["kept"]) == 2
    acceptance, total = found["acceptance"], evaluation.acceptance.total
    assert (acceptance["draft_tokens"], acceptance["prompts"]) == (2, 2)
    assert (acceptance["drafts"], acceptance["accepted"]) == (total.drafts, total.accepted)
    assert acceptance["mean_length"] == total.mean_length > 1
    written = json.loads((finished_run.folder / "evaluation.json").read_text())
    assert written["heads"] == found["heads"]
    with Image.open(folder / "evaluation.png") as picture:
        assert picture.width > 1000
        assert len(set(picture.convert("RGB").resize((400, 200)).get_flattened_data())) > 20


def test_mlflow_has_the_measurement(evaluated, finished_run):
    from mlflow import MlflowClient

    evaluation, _ = evaluated
    client = MlflowClient(tracking_uri=finished_run.database)
    (run,) = client.search_runs([client.get_experiment_by_name("evaluation").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/ce_head_2"] == evaluation.heads[2].ce
    assert run.data.metrics["decoding/tokens_per_forward"] == evaluation.decoding.speculation.tokens_per_forward
    assert run.data.metrics["val/accepted_length"] == evaluation.acceptance.total.mean_length
    assert run.data.metrics["val/accepted_head_2"] == evaluation.acceptance.total.rates[1]
    assert run.data.tags["checkpoint"].endswith("/model")
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"evaluation.json", "evaluation.png"}


def test_a_model_without_heads_is_one_head_that_does_not_draft(finished_run, corpus_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(finished_run.folder / "model", bare, ignore=shutil.ignore_patterns("mtp_*", ".mtp_files.json"))
    source, made = find_checkpoint(str(bare))
    assert made is None, "there is no run around it"
    data = [f"data.corpus={corpus_folder}", "data.holdout_fraction=0.2", "data.sequence_length=64"]
    evaluation = evaluate(source, load_evaluation(made, [*SMALL, *data]), tmp_path / "eval", QUIET)
    assert evaluation.heads == finished_run.evaluation.heads[:1]
    assert evaluation.decoding is None
    assert evaluation.tokens_per_forward is None


def test_heads_of_another_model_are_refused_in_one_line(finished_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished_run.folder / "model", other)
    heads = json.loads((other / "mtp_heads.json").read_text())
    (other / "mtp_heads.json").write_text(json.dumps({**heads, "horizon": 5}))
    (other / ".mtp_files.json").unlink()  # or the change itself is refused
    recipe = load_evaluation(finished_run.folder / "recipe.yaml", SMALL)
    with pytest.raises(RecipeError, match=r"can't be loaded: .* has 2 extra heads, .* horizon 5") as raised:
        evaluate(str(other), recipe, tmp_path / "eval", QUIET)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "eval").exists()


def test_a_model_that_is_not_finite_is_refused_and_not_measured(finished_run, tmp_path):
    """Its cross entropies would be no numbers."""
    bad = tmp_path / "bad"
    model = AutoModelForCausalLM.from_pretrained(finished_run.folder / "model")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    model.save_pretrained(bad)
    for file in (finished_run.folder / "model").glob("tokenizer*"):
        shutil.copy(file, bad)
    recipe = load_evaluation(finished_run.folder / "recipe.yaml", SMALL)
    with pytest.raises(
        RecipeError, match=r"^CHECKPOINT '.*bad' has inf in its parameter \S*norm\.weight; expected finite"
    ):
        evaluate(str(bad), recipe, tmp_path / "eval", QUIET)
    assert not (tmp_path / "eval").exists()


def test_prompts_of_a_file_are_counted_by_their_domain(finished_run, tmp_path, monkeypatch, capsys):
    """The counts are those of the function that a script calls, for the tokens that the file names."""
    monkeypatch.chdir(tmp_path)
    texts = {"code": ["def main(argv=None):\n", "import os\n"], "words": ["Write the report to the file"]}
    lines = [{"prompt": text, "domain": domain} for domain in texts for text in texts[domain]]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--prompts", "p.jsonl", "tracking.kind=none", "validation.decoding.new_tokens=20", "validation.rows=1"]
    assert cli.main([str(finished_run.folder), *words, "validation.decoding.draft_tokens=1", "--output", "out"]) == 0
    printed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in printed if row[-1:] in (["code"], ["words"], ["all"])] == [
        ["2", "code"],
        ["1", "words"],
        ["3", "all"],
    ]
    model = MTPWrapper.from_pretrained(finished_run.folder / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished_run.folder / "model")
    found = json.loads(Path("out/evaluation.json").read_text())
    for domain in texts:
        tokens = [tokenizer(text)["input_ids"] for text in texts[domain]]
        expected = sum(measure_acceptance(model, tokens, 20, 1), Acceptance())
        assert found["acceptance"]["domains"][domain]["drafts"] == expected.drafts
        assert found["acceptance"]["domains"][domain]["accepted"] == expected.accepted
    assert found["acceptance"]["draft_tokens"] == 1
    assert found["decoding"]["prompts"] == 3
    assert found["acceptance"]["accepted"][0] > 0


@pytest.mark.parametrize(
    ("bare", "words", "complaint"),
    [
        (False, ["validation.decoding.draft_tokens=3"], "validation.decoding.draft_tokens is 3; expected from 1 to 2"),
        (True, ["validation.decoding.draft_tokens=1"], "validation.decoding.draft_tokens needs heads that draft"),
        (True, ["--prompts", "p.jsonl"], "--prompts needs heads that draft; CHECKPOINT has 1 heads, 'none'"),
        (False, ["--prompts", "long.jsonl"], "long.jsonl, line 2: 200 tokens of a prompt, 12 new ones"),
    ],
)  # fmt: skip
def test_what_the_heads_and_the_model_can_not_do_is_refused_in_one_line(
    bare, words, complaint, finished_run, corpus_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run.folder / "model", "model")
    if bare:
        for file in (*Path("model").glob("mtp_*"), Path("model/.mtp_files.json")):
            file.unlink()
    Path("p.jsonl").write_text('{"prompt": "import os"}\n')
    Path("long.jsonl").write_text('{"prompt": "import os"}\n' + json.dumps({"prompt_token_ids": [5] * 200}) + "\n")
    data = [f"data.corpus={corpus_folder}", "data.holdout_fraction=0.2", "data.sequence_length=64"]
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 210}))
    Path("model/.mtp_files.json").unlink(missing_ok=True)
    assert cli.main(["./model", *SMALL, *data, *words, "--output", "out"]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    assert not Path("out").exists()


def test_a_model_that_can_not_verify_drafts_has_counts_all_the_same(monkeypatch):
    """As a hybrid, whose state can't be rolled back: an engine serves it, and speculative decoding here does not."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MTPWrapper(LlamaForCausalLM(LlamaConfig(vocab_size=30, eos_token_id=None, **sizes)), 3).eval()
    printed = Console(file=io.StringIO(), width=200)
    documents = {"src/a/x.py": [1, 2, 3, 4], "src/b/y.py": [4, 5, 6], "src/a/z.py": [7, 8, 9]}
    inputs = SimpleNamespace(
        device=torch.device("cpu"), console=printed,
        tokens=SimpleNamespace(held_out=[torch.tensor(tokens) for tokens in documents.values()]),
        corpus=SimpleNamespace(held_out=[Document(path, "") for path in documents]),
    )  # fmt: skip
    config = DecodingConfig(prompts=3, prompt_tokens=3, new_tokens=8)
    expected = decode(model, inputs, config)
    assert expected.decoding is not None

    def uncroppable(*arguments, **options):
        raise UncroppableCacheError("the model's cache can't be cropped")

    monkeypatch.setattr(decoding, "generate_speculatively", uncroppable)
    found = decode(model, inputs, config)
    assert (found.decoding, found.acceptance) == (None, expected.acceptance)
    assert {name: counts.prompts for name, counts in found.acceptance.domains.items()} == {"a": 2, "b": 1}
    assert "decoding    none: the model's cache can't be cropped" in printed.file.getvalue()


MISTAKES = {
    "no checkpoint": ([], ["expected one checkpoint", "got 0"]),
    "two": (["run", "other"], ["expected one checkpoint", "got 2"]),
    "nowhere": (["./nowhere"], ["CHECKPOINT is './nowhere', which is neither a folder nor a .gguf file"]),
    "no model": (["empty"], ["CHECKPOINT 'empty' has no readable config.json"]),
    "no causal model": (["critic"], ["is a LlamaForTokenClassification; expected a causal language model"]),
    "unknown key": (["run", "validation.row=3"], ["unknown key 'validation.row'; did you mean 'validation.rows'?"]),
    "a key of training": (["run", "train.steps=3"], ["unknown key 'train'"]),
    "another tokenizer": (
        ["run", "data.tokenizer=other"],
        ["data.tokenizer is other, but a checkpoint has its own"],
    ),
    "wrong value": (["run", "validation.decoding.new_tokens=1"], ["'validation.decoding.new_tokens' is 1"]),
    "existing folder": (["run", "--output", "empty"], ["output folder empty exists"]),
    "no prompts": (["run", "--prompts", "p.jsonl"], ["--prompts has", "p.jsonl, which can't be read: No such file"]),
    "prompts elsewhere": (
        ["run", "--prompts", "s3://bucket/p.jsonl"],
        ["--prompts", "it is the address s3://bucket/p.jsonl; give a file on this machine"],
    ),
    "a wrong prompt": (
        ["run", "--prompts", "bad.jsonl"],
        ["bad.jsonl, line 2: expected one of 'prompt', 'messages' and", "has none"],
    ),
    "no drafts": (["run", "validation.decoding.draft_tokens=0"], ["'validation.decoding.draft_tokens' is 0"]),
    "no corpus": (["run", "data.corpus=./texts"], ["data.corpus", "./texts"]),
    "unknown flag": (["run", "--out"], ["unrecognized arguments: --out", "--help"]),
}


def test_a_mistake_costs_one_line_and_no_torch(refused, tmp_path: Path):
    for name, architecture in {"run": "LlamaForCausalLM", "critic": "LlamaForTokenClassification"}.items():
        (tmp_path / name).mkdir()
        config = {"architectures": [architecture], "vocab_size": 300}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    refused("eval-mtp", MISTAKES, tmp_path)
