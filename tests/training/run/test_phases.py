"""A signal in each phase of a run: it ends with its exit code, and what was done is saved or resumes bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from mtp_ce.training.cli import train as cli
from mtp_ce.training.config.recipe import to_yaml
from mtp_ce.training.errors import StoppedError
from mtp_ce.training.interrupt import Stop, stop_on_signal, terminate_in_order
from mtp_ce.training.run import fitting, main_stage, pipeline, stages
from mtp_ce.training.run.folder import finished

STEPS = ["train.steps=4", "train.log_every=1", "validation.every=null", "validation.rows=8", "validation.batch_size=4"]
WORDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated"), signal.SIGHUP: (129, "hung up")}


@pytest.fixture
def usual_signals():
    """Python's own handlers: a test runner in the background may have some signals ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(small, usual_signals, tmp_path, monkeypatch, capsys):
    """Run the command line in a folder with the recipe; returns exit code, lines of stderr, and stdout."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, overrides: tuple[str, ...] = ()) -> tuple[int, list[str], str]:
        Path("recipe.yaml").write_text(to_yaml(small([*STEPS, *overrides])))
        code = cli.main(arguments or ["recipe.yaml", "--output", "out"])
        said = capsys.readouterr()
        return code, said.err.splitlines(), said.out

    return run


@pytest.fixture
def during(monkeypatch):
    """Send a signal at the start of a call of a function, once."""

    def plant(owner: object, name: str, number: int, when=lambda *arguments: True) -> None:
        usual, sent = getattr(owner, name), []

        def call(*arguments, **options):
            if not sent and when(*arguments):
                sent.append(number)
                signal.raise_signal(number)
            return usual(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    return plant


def parameters(output: Path) -> dict[str, bytes]:
    files = [load_file(output / "model" / f"{name}.safetensors") for name in ("model", "mtp_heads")]
    return {name: tensor.numpy().tobytes() for tensors in files for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def undisturbed_run(small, tmp_path_factory) -> Path:
    """The folder of a run that nobody stops."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    pipeline.train(small(STEPS), folder, Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run) -> dict[str, bytes]:
    """Its parameters."""
    return parameters(undisturbed_run)


def report(output: Path) -> list:
    """What a run has reported: the heads on held-out text, drafts of decoding, and the names of all its metrics."""
    said = json.loads((output / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [said["heads"], said["before"], said["decoding"]["kept"], [(line["step"], sorted(line)) for line in lines]]


def test_while_inputs_are_read_nothing_has_begun(command, during):
    during(pipeline, "read_inputs", signal.SIGTERM)
    assert command()[:2] == (143, ["train-mtp: terminated"])
    assert not Path("out").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP])
def test_before_the_first_step_there_is_nothing_to_save_and_a_resumed_run_says_where_it_starts(
    number, command, during, undisturbed
):
    code, word = WORDS[number]
    during(fitting, "build_optimizer", number)
    answered, complained, _ = command()
    assert answered == code
    assert complained == [f"train-mtp: {word}; train-mtp --resume out starts again, as there is no checkpoint yet"]
    answered, _, printed = command("--resume", "out")
    assert answered == 0
    assert "resumed     no checkpoint yet; starts at step 1\n" in printed
    assert parameters(Path("out")) == undisturbed


# The signal, the method in which it comes, at which call, and the step of the checkpoint that is written for it.
LOOP = {
    "in a step": (signal.SIGHUP, "_step", lambda trainer, step, window: step == 3, 3),
    "in the last step": (signal.SIGTERM, "_step", lambda trainer, step, window: step == 4, 4),
    "in the last validation": (signal.SIGINT, "validate", lambda trainer, *_: trainer.done == 4, 4),
}


@pytest.mark.parametrize("phase", LOOP)
def test_in_the_loop_every_step_is_in_a_checkpoint(phase, command, during, undisturbed):
    number, name, when, step = LOOP[phase]
    code, word = WORDS[number]
    during(fitting.Trainer, name, number, when)
    answered, complained, _ = command()
    assert answered == code
    assert complained == [f"train-mtp: {word}; metrics so far are in out/metrics.jsonl; train-mtp --resume out resumes"]
    (kept,) = Path("out/checkpoints").iterdir()
    assert kept.name == f"step-{step:08d}"
    assert not Path("out/model").exists()
    answered, _, printed = command("--resume", "out")
    assert answered == 0
    assert f"resumed     after step {step}, from out/checkpoints/{kept.name}\n" in printed
    assert parameters(Path("out")) == undisturbed


@pytest.mark.parametrize(
    ("owner", "name", "number", "every"),
    [
        (fitting, "save_model", signal.SIGTERM, "200"),
        (fitting, "save_model", signal.SIGINT, "null"),
        (main_stage, "decode", signal.SIGHUP, "200"),
        (main_stage, "write_evaluation", signal.SIGINT, "200"),
    ],
)
def test_from_the_last_validation_on_the_model_is_saved_and_the_report_is_all_that_is_resumed(
    owner, name, number, every, command, during, undisturbed, undisturbed_run
):
    """While the model is saved the signal waits, also without checkpoints; while the report is made it does not."""
    code, word = WORDS[number]
    during(owner, name, number)
    answered, complained, _ = command(overrides=(f"checkpoint.every={every}",))
    assert answered == code
    assert complained == [
        f"train-mtp: {word}; the model is saved in out/model, train-mtp --resume out writes the report"
    ]
    assert finished(Path("out"))
    assert parameters(Path("out")) == undisturbed
    assert not Path("out/evaluation.json").exists()
    saved = Path("out/model/model.safetensors").stat()
    answered, _, printed = command("--resume", "out")
    assert answered == 0
    assert "resumed     the model is in out/model; its report is missing\n" in printed
    assert Path("out/model/model.safetensors").stat() == saved, "nothing is trained again"
    assert report(Path("out")) == report(undisturbed_run)
    answered, _, printed = command("--resume", "out")
    assert (answered, printed.count("\n"), printed[:17]) == (0, 1, "run out finished "), "the report is complete"


def test_of_a_report_only_what_was_written_is_resumed(command, during):
    """A model or a record that has changed is one line."""
    during(main_stage, "decode", signal.SIGTERM)
    assert command()[0] == 143
    record = Path("out/run.json").read_text()
    Path("out/run.json").write_text(record.replace('"ce": ', '"ce": 1'))
    answered, (complained,), _ = command("--resume", "out")
    assert answered == 2
    assert (
        "run out has a run.json that differs from what was written; its model is in out/model, and eval" in complained
    )
    Path("out/run.json").write_text(record)
    weights = Path("out/model/model.safetensors")
    weights.write_bytes(bytes(weights.stat().st_size))
    answered, (complained,), _ = command("--resume", "out")
    assert answered == 2
    assert complained.startswith("train-mtp: error: --resume 'out' is damaged: model.safetensors differs from what was")


def test_a_run_in_training_is_resumed_by_no_other_process(command, monkeypatch, undisturbed):
    """It would write the same checkpoints and metrics. A lock does not ask which process asks."""
    usual, answers = fitting.Trainer._step, []

    def step(trainer, number, window):
        if number == 3 and not answers:
            answers.append(None)
            answers[0] = cli.main(["--resume", "out"])
        return usual(trainer, number, window)

    monkeypatch.setattr(fitting.Trainer, "_step", step)
    answered, (complained,), _ = command()
    assert (answered, answers) == (0, [2])
    assert complained.startswith(f"train-mtp: error: run out is being trained by process {os.getpid()} on ")
    assert parameters(Path("out")) == undisturbed


def test_a_signal_while_a_stage_is_stored_loses_nothing_of_it(rho1, usual_signals, during, tmp_path, monkeypatch):
    """It ends the run when the stage is in the cache, from which the next run has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = rho1(["train.steps=1", "optimizer.warmup_steps=0", "reference.train.steps=2"])
    during(stages, "store_stage", signal.SIGTERM)
    with terminate_in_order(), pytest.raises(StoppedError):
        pipeline.train(recipe, tmp_path / "run", Console(quiet=True))
    with (tmp_path / "printed.txt").open("w") as printed:
        pipeline.train(recipe, tmp_path / "run", Console(file=printed, width=200), resume=True)
    assert "reference   reused, unchanged since" in (tmp_path / "printed.txt").read_text()


def test_a_block_inside_another_has_the_same_flag(usual_signals):
    with terminate_in_order(), stop_on_signal() as outer:
        with stop_on_signal() as inner:
            signal.raise_signal(signal.SIGHUP)
        assert inner is outer
        assert outer.signal == signal.SIGHUP


def test_work_that_may_end_at_once_does_and_what_it_defers_does_not(usual_signals):
    with terminate_in_order(), stop_on_signal() as stop, stop.at_once():
        with stop_on_signal():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StoppedError), stop.at_once():
            pytest.fail("the signal has come already")
    with terminate_in_order(), stop_on_signal() as stop:
        with pytest.raises(StoppedError), stop.at_once():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # ignored from then on


def test_hanging_up_a_process_that_ignores_it_changes_nothing(usual_signals):
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with terminate_in_order(), stop_on_signal() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.is_set()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert not Stop().is_set()
