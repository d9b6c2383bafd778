"""The same recipe on one process, on two and on four: the same numbers, and one end for all.

torchrun starts the processes on gloo, which call the command line one recipe after the other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.distributed import HashStore
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mtp_ce.hf import head_loss
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.training.cli import train as cli
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.errors import RecipeError, StoppedError
from mtp_ce.training.loop.checkpoint import read_checkpoint
from mtp_ce.training.loop.ranks import Ranks, agree_on_round, join_ranks
from mtp_ce.training.models.build import build_model
from mtp_ce.training.run import fitting, pipeline
from mtp_ce.training.run.folder import finished
from mtp_ce.training.run.inputs import read_inputs

# Both ranks run every command line in turn; then each writes what main returned. A poisoned scorer stays.
DRIVER = """
import json, os, signal, sys, time
import torch
from mtp_ce.scorers.uniform import UniformScorer
from mtp_ce.scorers.weights import TokenWeights
from mtp_ce.training.run import fitting
from mtp_ce.training.run import pipeline
from mtp_ce.training.run import main_stage
from mtp_ce.training.cli.train import main

RANK = int(os.environ["RANK"])
USUAL = fitting.Trainer

def poison_rank_1():
    fitting.Trainer = USUAL
    usual, calls = UniformScorer.run, []
    def run(self, *args, **options):
        calls.append(1)
        found = usual(self, *args, **options)
        if RANK == 1 and len(calls) == 3:
            return TokenWeights(found.weights * torch.nan, found.statistics)
        return found
    UniformScorer.run = run

def stop_rank_1(number=signal.SIGINT):
    class Impatient(USUAL):
        def _step(self, step, window):
            if RANK == 1 and step == 3:
                os.kill(os.getpid(), number)
            super()._step(step, window)
    fitting.Trainer = Impatient

def terminate_rank_1():
    stop_rank_1(signal.SIGTERM)

def stop_rank_1_in_last_validation():
    class Impatient(USUAL):
        def validate(self, rows=None):
            if RANK == 1 and self.done == 5:
                os.kill(os.getpid(), signal.SIGHUP)
            return super().validate(rows)
    fitting.Trainer = Impatient

def spoil_moment_of_rank_1():
    class Spoilt(USUAL):
        def _step(self, step, window):
            super()._step(step, window)
            if RANK == 1 and step == 2:
                (first, *_) = self.model.parameters()
                self.optimizer.state[first]["exp_avg"].to_local()[-1] = torch.nan
    fitting.Trainer = Spoilt


def terminate(ranks, owner, name):
    # In a call of rank 0, for which rank 1 waits in a collective.
    fitting.Trainer = USUAL
    usual, pids = getattr(owner, name), [None, None]
    torch.distributed.all_gather_object(pids, os.getpid())
    def call(*args, **options):
        setattr(owner, name, usual)
        for rank in ranks:
            os.kill(pids[rank], signal.SIGTERM)
            time.sleep(0.2)
        return usual(*args, **options)
    if RANK == 0:
        setattr(owner, name, call)

def terminate_both_in_report():
    # As torchrun does.
    terminate((1, 0), main_stage, "decode")

def terminate_rank_1_in_report():
    terminate((1,), main_stage, "decode")

def terminate_rank_1_while_the_model_is_saved():
    terminate((1,), fitting, "save_model")

def terminate_rank_1_while_inputs_are_read():
    terminate((1,), pipeline, "read_inputs")

def lose_corpus_of_rank_1():
    usual = pipeline.read_inputs
    def read(recipe, *others):
        if RANK == 1:
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"corpus": "lost"})})
        return usual(recipe, *others)
    pipeline.read_inputs = read

# One group for all of them: to leave one and join another needs another process.
torch.distributed.init_process_group("gloo")
codes = []
for arguments in json.load(open(sys.argv[1])):
    if arguments[0] in globals():
        globals()[arguments.pop(0)]()
    codes.append(main(arguments))
json.dump(codes, open(f"{sys.argv[1]}.{RANK}", "w"))
"""

COMMON = ["train.steps=5", "train.log_every=1", "validation.every=2", "validation.batch_size=3", "name=ranks"]
# The held-out rows are dealt out unevenly.
COMMON += ["validation.decoding.prompts=0", "validation.rows=13", "data.sequence_length=48"]
RHO1 = ["scorer={name: rho1_excess}", "reference={train: {steps: 3, batch_size: 4}}"]
# Rows of a document each, of which some are padding for the most part, and some a prompt that has no end.
PAIRS = ["data.corpus=PAIRS", "data.prompt_field=prompt", "data.completion_field=completion", "data.packing=padded"]
PAIRS += ["data.vocab_size=300", "reference.documents=all"]
# A mixture of experts, whose routers are balanced over what lies in one micro-batch.
EXPERTS = ["model={kind: pretrained, source: EXPERTS, mtp: {horizon: 3}}", "data.vocab_size=null"]
SHARED = ["train.tensor_parallel=2", "model.kv_heads=2"]
SHARDED = {
    "uniform, whole batches": [],
    # AdamW divides a gradient near 0, which is rounding, by its own size: a step of the learning rate.
    "rho1, the mean over all ranks is 1": [
        "optimizer.lr=1e-3",
        "scorer={name: rho1_excess, scope: global}",
        *RHO1[1:],
    ],
    "layer heads on a detached trunk": [
        "model.mtp={kind: layer, trunk: detached}",
        "train.micro_batch_size=1",
    ],
    "chained heads, tied embeddings": ["model.mtp.kind=sequential", "model.tie_embeddings=true"],
    "one module for all depths": ["model.mtp={kind: sequential, shared: true}", "train.micro_batch_size=1"],
    "heads that recompute": ["model.mtp={kind: layer, activation_checkpointing: true}", "train.micro_batch_size=1"],
    "prompts, padded, rows without a target": [*RHO1, *PAIRS, "train.micro_batch_size=1"],
    "in little memory": [*RHO1, "train.activation_checkpointing=true", "train.cpu_offload=true"],
    "shared layers of a pretrained Qwen3": [
        "train.tensor_parallel=2",
        "model={kind: pretrained, source: QWEN, mtp: {horizon: 3, kind: sequential}}",
        "data.vocab_size=null",
    ],
    "shared layers, those of the heads too, in little memory": [
        *SHARED,
        "model.mtp.kind=layer",
        "train.micro_batch_size=2",
        "train.activation_checkpointing=true",
        "train.cpu_offload=true",
    ],
}
# On four ranks, in two groups that share the layers; the vocabulary is no multiple of the ranks.
GRID = {
    "grid": [*SHARED, "data.vocab_size=511", "model.mtp.kind=sequential", "model.tie_embeddings=true"],
    "grid, the mean over all ranks is 1": [
        *SHARED, "optimizer.lr=1e-3", "scorer={name: rho1_excess, scope: global}", *RHO1[1:],
    ],
    "grid, uneven": [*SHARED, "train.batch_size=7"],
    "grid, kv heads": ["train.tensor_parallel=2"],
    "grid, experts": ["train.tensor_parallel=2", *EXPERTS],
    "grid, three": [*SHARED, "train.tensor_parallel=3"],
    "grid, interrupt": SHARED,
}  # fmt: skip
# What one rank does, the exit code of both, overrides.
ENDS = {
    "interrupt": ("stop_rank_1", 130, []),
    "terminate": ("terminate_rank_1", 143, []),
    "last validation": ("stop_rank_1_in_last_validation", 129, []),
    "report": ("terminate_both_in_report", 143, []),
    "report, rank 1": ("terminate_rank_1_in_report", 143, []),
    "saving": ("terminate_rank_1_while_the_model_is_saved", 143, []),
    "reading": ("terminate_rank_1_while_inputs_are_read", 143, []),
    "moment": ("spoil_moment_of_rank_1", 3, ["checkpoint.every=2"]),
    "nan": ("poison_rank_1", 3, ["checkpoint.every=1"]),
    "lost": ("lose_corpus_of_rank_1", 2, []),
}


def arguments(recipe_file: Path, output: Path, overrides: list[str]) -> list[str]:
    return [str(recipe_file), *located(overrides, recipe_file.parent), "--output", str(output)]


def located(overrides: list[str], folder: Path) -> list[str]:
    places = {"PAIRS": folder / "pairs.jsonl", "EXPERTS": folder / "experts", "QWEN": folder / "qwen"}
    return [re.sub("|".join(places), lambda found: str(places[found[0]]), override) for override in overrides]


def write_pairs(path: Path) -> None:
    """Lines of Python after some of the lines before them; of every fourth prompt the row has no room for more."""
    code = Path(json.__file__).with_name("decoder.py").read_text().splitlines()
    pairs = [
        {"prompt": "\n".join(code[i : i + (40 if i % 4 == 0 else 1 + i % 3)]), "completion": code[i + 40] + " "}
        for i in range(len(code) - 40)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def save_models(recipe: Recipe, folder: Path) -> None:
    """Tiny models with the recipe's tokenizer: a mixture of experts that asks for its routers' loss, and a Qwen3."""
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    experts = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "router_aux_loss_coef": 1.0}
    grouped = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    models = {
        "experts": MixtralForCausalLM(MixtralConfig(**sizes, **experts, output_router_logits=True)),
        "qwen": Qwen3ForCausalLM(
            Qwen3Config(**sizes, **grouped, head_dim=8, tie_word_embeddings=True, attention_bias=True)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        read_inputs(recipe, Console(quiet=True)).tokenizer.save_pretrained(folder / name)


def begin_alone(recipe: Recipe, folder: Path) -> None:
    """Have this process stop in its third step."""

    class Impatient(fitting.Trainer):
        def _step(self, step, window):
            if step == 3:
                raise StoppedError
            super()._step(step, window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "Trainer", Impatient)
        with pytest.raises(StoppedError):
            pipeline.train(recipe, folder, Console(quiet=True))


def start(ranks: int, calls: dict[str, list[str]], folder: Path) -> tuple[Path, dict[str, tuple[int, ...]], str]:
    """Run command lines on so many ranks: folder, exit codes of all by name, what was said."""
    (folder / "driver.py").write_text(DRIVER)
    (folder / "calls").write_text(json.dumps(list(calls.values())))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    with subprocess.Popen(
        [*torchrun, str(folder / "driver.py"), str(folder / "calls")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as run:  # fmt: skip
        try:
            said, _ = run.communicate(timeout=1500)
        except subprocess.TimeoutExpired:
            run.terminate()  # then torchrun ends its workers; killed, it would leave them
            said, _ = run.communicate()
    assert run.returncode == 0, said[-3000:]
    codes = [json.loads((folder / f"calls.{rank}").read_text()) for rank in range(ranks)]
    return folder, dict(zip(calls, zip(*codes, strict=True), strict=True)), said


@pytest.fixture(scope="module")
def grid(small, tmp_path_factory):
    """Everything that four ranks do in this file, from one start."""
    from mtp_ce.training.config.recipe import to_yaml

    folder = tmp_path_factory.mktemp("grid")
    (folder / "recipe.yaml").write_text(to_yaml(small(COMMON)))
    save_models(small(COMMON), folder)
    calls = {name: arguments(folder / "recipe.yaml", folder / name, own) for name, own in GRID.items()}
    calls["grid, interrupt"] = ["stop_rank_1", *calls["grid, interrupt"]]
    return start(4, calls, folder)


@pytest.fixture(scope="module")
def launched(small, grid, tmp_path_factory):
    """Everything that two ranks do in this file, from one start: folder, exit codes of both by name, what was said."""
    from mtp_ce.training.config.recipe import to_yaml

    folder = tmp_path_factory.mktemp("ranks")
    (folder / "recipe.yaml").write_text(to_yaml(small(COMMON)))
    write_pairs(folder / "pairs.jsonl")
    calls = {name: arguments(folder / "recipe.yaml", folder / name, own) for name, own in SHARDED.items()}
    calls["bf16"] = arguments(folder / "recipe.yaml", folder / "bf16", ["train.precision=bf16"])
    save_models(small(COMMON), folder)
    calls["experts"] = arguments(folder / "recipe.yaml", folder / "experts on two", EXPERTS)
    begin_alone(small(COMMON), folder / "begun alone")
    calls["begun alone"] = ["--resume", str(folder / "begun alone")]
    shutil.copytree(grid[0] / "grid, interrupt", folder / "begun on a grid")
    calls["begun on a grid"] = ["--resume", str(folder / "begun on a grid")]
    calls["uneven"] = arguments(folder / "recipe.yaml", folder / "uneven", ["train.batch_size=7"])
    # Last, because what they change in the program stays.
    for name, (change, _, own) in ENDS.items():
        calls[name] = [change, *arguments(folder / "recipe.yaml", folder / name, own)]
        if name == "report":
            calls["report resumed"] = ["--resume", str(folder / name)]
    return start(2, calls, folder)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained() -> dict[tuple[str, ...], Path]:
    """Finished runs of one process by their overrides: several tests compare with the same one."""
    return {}


@pytest.fixture
def alone(small, trained, tmp_path_factory, monkeypatch):
    """Train in this process, with the overrides given; gives the folder, which no test may change."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))

    def run(overrides: list[str], folder: Path | None = None) -> Path:
        if folder is None and tuple(overrides) in trained:
            return trained[tuple(overrides)]
        output = folder or tmp_path_factory.mktemp("alone") / "run"
        pipeline.train(small([*COMMON, *overrides]), output, Console(quiet=True), resume=output.exists())
        if folder is None:
            trained[tuple(overrides)] = output
        return output

    return run


@pytest.mark.parametrize("name", SHARDED)
def test_two_ranks_train_as_one_does(name, launched, alone, same_training):
    folder, codes, _ = launched
    assert codes[name] == (0, 0)
    same_training(alone(located(of_one(SHARDED[name]), folder)), folder / name, steps=5)


def of_one(overrides: list[str]) -> list[str]:
    """The overrides of one process that trains the same."""
    return [option for option in overrides if "micro_batch" not in option and "tensor_parallel" not in option]


@pytest.mark.parametrize("name", ["grid", "grid, the mean over all ranks is 1"])
def test_groups_of_ranks_that_share_layers_train_as_one_process_does(name, grid, alone, same_training):
    """FSDP over two groups of two ranks: losses, gradient norms, weights, validations and the saved parameters."""
    folder, codes, said = grid
    assert codes[name] == (0, 0, 0, 0), said[-3000:]
    assert "suboptimal" not in said, "torch's warning about how it gathers a mesh of two dimensions"
    same_training(alone(of_one(GRID[name])), folder / name, steps=5)


def test_one_group_goes_on_with_what_two_groups_began(grid, launched, alone, same_training):
    """Four ranks stop in their third step, with a checkpoint; two go on."""
    assert grid[1]["grid, interrupt"] == (130,) * 4
    folder, codes, _ = launched
    assert codes["begun on a grid"] == (0, 0)
    same_training(alone(of_one(SHARED)), folder / "begun on a grid", steps=5)


def test_one_process_goes_on_with_what_shared_layers_began(grid, alone, same_training, tmp_path):
    shutil.copytree(grid[0] / "grid, interrupt", tmp_path / "went on")
    same_training(alone(of_one(SHARED)), alone(of_one(SHARED), tmp_path / "went on"), steps=5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grid, uneven", "train.batch_size 7 is not divisible by 2 groups of 2 ranks; give a multiple"),
        ("grid, three", "train.tensor_parallel 3 does not divide the 4 ranks of this run; start a multiple of 3"),
        (
            "grid, kv heads",
            "train.tensor_parallel is 2, but num_key_value_heads of LlamaForCausalLM is 1; give a number that "
            "divides it",
        ),
        (
            "grid, experts",
            "train.tensor_parallel is 2, but mlp.experts.gate_up_proj of MixtralForCausalLM is packed_colwise in its "
            "plan, not one of colwise, rowwise, replicated_with_grad_allreduce; give 1",
        ),
    ],
)
def test_layers_that_can_not_be_shared_are_a_mistake_of_the_recipe(name, expected, grid):
    _, codes, said = grid
    assert codes[name] == (2,) * 4
    assert said.count(expected) == 1


def test_rows_one_by_one_train_as_a_whole_batch_does_in_one_process(launched, alone, same_training, tmp_path):
    folder, _, _ = launched
    own = located([*RHO1, *PAIRS], folder)
    same_training(alone(own), alone([*own, "train.micro_batch_size=1"], tmp_path / "rows"), steps=5)
    inputs = (line["train/valid_token_ratio"] for line in lines(tmp_path / "rows") if "train/loss" in line)
    assert all(0 < ratio < 0.9 for ratio in inputs)


def test_experts_on_two_ranks_are_balanced_as_in_two_micro_batches(launched, alone, same_training, tmp_path):
    folder, codes, _ = launched
    assert codes["experts"] == (0, 0)
    own = located([*EXPERTS, "train.micro_batch_size=4"], folder)
    same_training(alone(own), folder / "experts on two", steps=5)
    (first, *_) = lines(folder / "experts on two")
    assert first["train/loss"] > first["train/ce_mean"] + 2, "the coefficient is 1, and 2 of 4 experts are taken"


def test_bf16_on_two_ranks_learns_as_fp32_does(launched, alone):
    folder, codes, _ = launched
    assert codes["bf16"] == (0, 0)
    ours, theirs = (
        [line["train/loss"] for line in lines(run) if "train/loss" in line] for run in (alone([]), folder / "bf16")
    )
    assert ours == pytest.approx(theirs, rel=3e-4)  # seen: 5e-5
    assert ours != pytest.approx(theirs, rel=1e-6), "it is another precision"


def test_one_process_goes_on_with_what_two_ranks_began(launched, alone, same_training, tmp_path):
    folder, _, _ = launched
    shutil.copytree(folder / "interrupt", tmp_path / "went on")
    same_training(alone([]), alone([], tmp_path / "went on"), steps=5)


def test_two_ranks_go_on_with_what_one_process_began(launched, alone, same_training):
    folder, codes, said = launched
    assert codes["begun alone"] == (0, 0)
    assert "resumed     after step 2, from" in said
    same_training(alone([]), folder / "begun alone", steps=5)


def test_a_number_that_is_not_finite_on_one_rank_stops_all_before_the_step(launched):
    folder, codes, said = launched
    assert codes["nan"] == (3, 3)
    assert [line["step"] for line in lines(folder / "nan") if "train/loss" in line] == [1, 2]
    assert not (folder / "nan" / "model").exists()
    kept = sorted((folder / "nan" / "checkpoints").iterdir())
    assert [checkpoint.name for checkpoint in kept] == ["step-00000001", "step-00000002"]
    decided = json.loads((kept[-1] / "state.json").read_text())["decided"]
    assert read_checkpoint(kept[-1], decided).step == 2, "whole, to the last byte"
    assert said.count("train/loss is nan at step 3") == 1, "one rank speaks for all"


@pytest.mark.parametrize(("name", "word"), [("interrupt", "interrupted"), ("terminate", "terminated")])
def test_a_signal_to_one_rank_stops_all_before_the_same_step_with_a_checkpoint(name, word, launched):
    folder, codes, said = launched
    code = ENDS[name][1]
    assert codes[name] == (code, code)
    assert [line["step"] for line in lines(folder / name) if "train/loss" in line] == [1, 2]
    assert said.count(f"train-mtp: {word}; metrics so far are in") == 1
    (kept,) = (folder / name / "checkpoints").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == [
        "shard-00001-model-00001-of-00001.safetensors", "shard-00002-model-00001-of-00001.safetensors", "state.json",
    ]  # fmt: skip


def test_a_signal_to_one_rank_in_the_last_validation_stops_all_and_loses_no_step(
    launched, alone, same_training, tmp_path
):
    folder, codes, said = launched
    assert codes["last validation"] == (129, 129)
    assert said.count("train-mtp: hung up; metrics so far are in") == 1
    (kept,) = (folder / "last validation" / "checkpoints").iterdir()
    assert kept.name == "step-00000005"
    assert not (folder / "last validation" / "model").exists()
    shutil.copytree(folder / "last validation", tmp_path / "went on")
    same_training(alone([]), alone([], tmp_path / "went on"), steps=5)


def test_a_signal_to_both_ranks_in_the_report_ends_both_with_the_model_saved(launched):
    """A rank that left the collective in which it waits would leave the other in it for hours."""
    folder, codes, said = launched
    assert codes["report"] == (143, 143)
    run = folder / "report"
    assert said.count(f"train-mtp: terminated; the model is saved in {run}/model, train-mtp --resume {run} writes") == 1
    assert finished(run)
    assert MTPWrapper.from_pretrained(run / "model").horizon == 3
    assert codes["report resumed"] == (0, 0)
    assert said.count(f"resumed     the model is in {run}/model; its report is missing") == 1
    heads = [json.loads((run / "evaluation.json").read_text())["heads"] for run in (run, folder / "report, rank 1")]
    assert heads[0] == heads[1]


def test_a_signal_to_one_rank_while_it_waits_for_the_other_ends_both(launched):
    """What rank 0 was at is complete by then: the report, the model, or what it has read."""
    folder, codes, said = launched
    assert {codes[name] for name in ("report, rank 1", "saving", "reading")} == {(143, 143)}
    assert said.count(f"terminated; the model is saved in {folder / 'report, rank 1'}/model\n") == 1
    assert (folder / "report, rank 1" / "evaluation.png").exists()
    assert f"terminated; the model is saved in {folder / 'saving'}/model, train-mtp --resume" in said
    assert not (folder / "saving" / "evaluation.json").exists()
    assert not (folder / "reading").exists()


def test_a_shard_that_is_not_finite_on_one_rank_is_saved_by_none(launched):
    folder, codes, said = launched
    assert codes["moment"] == (3, 3)
    assert said.count("exp_avg is nan after step 2, expected a finite number; nothing of it is saved") == 1
    assert not (folder / "moment" / "checkpoints").exists()


def test_a_batch_that_can_not_be_dealt_out_is_a_mistake_of_the_recipe(launched):
    folder, codes, said = launched
    assert codes["uneven"] == (2, 2)
    assert said.count("train.batch_size 7 is not divisible by 2 ranks") == 1
    assert not (folder / "uneven").exists()


def test_a_mistake_that_only_another_rank_meets_is_said_once_and_ends_all(launched):
    folder, codes, said = launched
    assert codes["lost"] == (2, 2)
    assert said.count(f"train-mtp: error: rank 1 on {socket.gethostname()}: data.corpus is 'lost'") == 1
    assert not (folder / "lost").exists()


def test_the_first_rank_of_another_machine_says_what_its_machine_lacks(monkeypatch, capsys):
    said = {}
    for rank, local in {8: 0, 9: 1}.items():
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert cli.main(["tiny", "data.corpus=lost"]) == 2
        said[rank] = capsys.readouterr().err
    assert said[8].startswith(f"train-mtp: error: rank 8 on {socket.gethostname()}: data.corpus is 'lost', which is")
    assert said[9] == "", "it has the same to say"


def test_micro_batches_must_divide_what_a_rank_gets():
    Ranks(size=2).check_batch(8, 4)
    with pytest.raises(RecipeError, match="micro_batch_size 8 does not divide the 4 rows that each of 2 ranks gets"):
        Ranks(size=2).check_batch(8, 8)


def test_ranks_take_equal_slices_that_are_the_batch():
    parts = [range(8)[Ranks(rank=rank, size=4).slice(8)] for rank in range(4)]
    assert [list(part) for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_ranks_that_are_started_again_agree_on_a_round_of_their_own():
    """Whatever ranks before them have left in the store: names, half an agreement, or a whole one."""
    store, size, rounds = HashStore(), 3, []
    for rank in range(size):
        store.set(f"name {rank}", f"dead {rank}")
        store.set(f"seen {rank}", "dead 0 dead 1 dead 2")
    store.set("names", "dead 0 dead 1 dead 2")
    store.set("round", "dead 0 dead 1 dead 2")
    for _ in range(3):
        with ThreadPoolExecutor(size) as ranks:
            # The first rank comes last, and finds names of both kinds.
            found = list(ranks.map(lambda rank: agree_on_round(store, rank, size), reversed(range(size))))
        assert len(set(found)) == 1
        rounds.append(found[0])
    assert len({*rounds}) == 3


def test_one_rank_is_a_round():
    assert agree_on_round(HashStore(), 0, 1)


def test_bf16_rounds_neither_the_weights_nor_what_the_loss_is_divided_by(small, monkeypatch):
    """Both come into forward from outside, and have more bits than bf16 has."""
    recipe = small(["train.precision=bf16"])
    model = build_model(recipe)
    tokens = torch.randint(recipe.data.vocab_size, (2, 16))
    weights, positions = 1 + torch.arange(32).view(2, 16) / 4096, torch.tensor(257.0)
    given = []
    usual = head_loss._linear

    def spy(output, call, hidden, inputs, options):
        given.append((hidden[0].dtype, output.weight.dtype, inputs.token_weights, inputs.normalizer))
        return usual(output, call, hidden, inputs, options)

    monkeypatch.setattr(head_loss, "_linear", spy)
    with join_ranks(torch.device("cpu"), recipe.train) as ranks:
        ranks.shard(model, recipe.train)
        model(tokens, labels=tokens, token_weights=weights, num_items_in_batch=positions).loss.backward()
    ((hidden, unembed, *numbers),) = given
    assert (hidden, unembed) == (torch.bfloat16, torch.bfloat16)
    for number, expected in zip(numbers, (weights, positions), strict=True):
        torch.testing.assert_close(number, expected, rtol=0, atol=0)
