"""Runs commands in copies of one process that has imported the trainer, each with a fault of its disk or without.

    python server.py [bare]     bare: a process that has imported nothing, for programs that need no trainer

Reads one JSON object a line from stdin, and writes one line with the exit code; null means that the command did not end
in time. What a command prints is in printed.txt and complained.txt of its working directory. The calls of the kinds in
shim.c that it made in the watched folder are in calls.txt: what happened, kind, path and new name, separated by tabs.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import hashlib
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import python_faults

# What a run imports on its way, beside what importing the commands brings.
PRELOADED = (
    "mtp_ce.training.cli.train",
    "mtp_ce.training.cli.evaluate",
    "mtp_ce.training.run.compare",
    "mtp_ce.training.run.evaluate",
    "mtp_ce.training.run.passages",
    "mtp_ce.training.data.jsonl",
    "mtp_ce.training.data.row_store",
    "mtp_ce.training.report.plot",
    "matplotlib.backends.backend_agg",
)


def execute(source: str) -> int:
    """Run Python source."""
    exec(source, {})
    return 0


def read_inputs(recipe: str, *overrides: str) -> int:
    """Print a hash of the texts, the tokens and the tokenizer that a run of a recipe would read."""
    from rich.console import Console

    from mtp_ce.training.config.recipe import load_recipe
    from mtp_ce.training.errors import RecipeError
    from mtp_ce.training.run import inputs

    try:
        read = inputs.read_inputs(load_recipe(recipe, overrides), Console(soft_wrap=True))
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    hasher = hashlib.sha256(json.dumps([read.digests, read.unigram]).encode())
    for texts, tokens in ((read.corpus.train, read.tokens.train), (read.corpus.held_out, read.tokens.held_out)):
        for document in texts:
            hasher.update(repr(document).encode())
        for ids in tokens:
            hasher.update(ids.numpy().tobytes())
    # What its own files add to the vocabulary; its name is the folder that it was read from.
    settings = {name: value for name, value in read.tokenizer.init_kwargs.items() if name != "name_or_path"}
    hasher.update(repr((settings, read.tokenizer.special_tokens_map, read.tokenizer.encode("def f(x):"))).encode())
    print("inputs", hasher.hexdigest())
    return 0


def command(name: str) -> Any:
    """The main function of a command, which takes its arguments as one list."""
    main = importlib.import_module(f"mtp_ce.training.cli.{name}").main
    return lambda *arguments: main(list(arguments))


PROGRAMS = {
    "execute": lambda: execute,
    "read-inputs": lambda: read_inputs,
    "train-mtp": lambda: command("train"),
    "eval-mtp": lambda: command("evaluate"),
}


def inject(fault: dict[str, Any]) -> None:
    """Watch a folder from now on; see fault_set in shim.c."""
    log = os.open("calls.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    order = (fault["folder"], fault["kind"], fault["n"], fault["error"], log)
    if "LD_PRELOAD" not in os.environ:
        python_faults.fault_set(*order)
        return
    folder, kind, *numbers = order
    if ctypes.CDLL(None).fault_set(os.fsencode(folder), kind.encode(), *numbers):
        raise ValueError(f"unknown kind of call {kind!r}")


def run(order: dict[str, Any]) -> int:
    """Run an order in this process, which is a copy of the server."""
    os.setsid()
    os.chdir(order["where"])
    os.environ.update(order["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "printed.txt"), (2, "complained.txt")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    program = PROGRAMS[order["program"]]()
    if order["fault"]:
        inject(order["fault"])
    return program(*order["arguments"])


def end(work: Any, *arguments: Any) -> None:
    """End this process, a copy, with the code of its work, as the interpreter would.

    The interpreter itself would look for leaks in modules that the server has imported, and print what it finds.
    """
    code = 1
    try:
        code = work(*arguments)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """Return the exit code of a child, or None after killing it because it does not end."""
    deadline = time.monotonic() + seconds
    ended = status = 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0 if ended else 0.005)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def prepare_trainer() -> None:
    """Do once what every copy would do by itself, and spare it what takes its time and is not looked at."""
    for module in PRELOADED:
        importlib.import_module(module)
    import torch
    from matplotlib.figure import Figure
    from transformers import conversion_mapping

    from mtp_ce.training.report import weights_plot

    torch.set_num_threads(1)
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    # Drawing takes half of a short run.
    Figure.savefig = lambda figure, path, **_: Path(path).write_bytes(b"a plot")
    weights_plot._draw_row = lambda *_, **__: None


def main(bare: bool) -> None:
    """Take orders until stdin is closed, and end as copies do."""
    if not bare:
        prepare_trainer()
    # The collector of a copy would otherwise write to every page that it shares with the server.
    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            end(run, order)
        print(json.dumps(wait(child, order["seconds"])), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:] == ["bare"])
