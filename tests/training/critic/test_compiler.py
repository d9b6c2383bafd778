"""Asking whether Python compiles a text has limits of time and memory, and no answer is taken for another."""

from __future__ import annotations

import os
import resource
import signal
import sysconfig
import time
from pathlib import Path

import pytest

from mtp_ce.training.critic import compiler as module
from mtp_ce.training.critic.compiler import MAX_BYTES, MAX_CHARACTERS, MAX_DEPTH, compiles
from mtp_ce.training.critic.functions import find_functions
from mtp_ce.training.data.corpus import Document


@pytest.fixture(autouse=True)
def _own_process():
    """No answer comes from another test."""
    compiles.cache_clear()
    yield
    module._COMPILER.end()


def nested(depth: int) -> str:
    """A function whose bytecode doubles with every level."""
    lines = ["def f():"]
    for level in range(1, depth + 1):
        lines += [f"{' ' * level}try: pass", f"{' ' * level}finally:"]
    return "\n".join([*lines, f"{' ' * (depth + 1)}pass\n"])


def test_nested_finally_costs_no_time_and_no_memory():
    """755 characters of it took 18 s and 1.9 GB."""
    text = nested(19)
    assert len(text) < 800
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert find_functions([Document("f.py", text)]) == []
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert compiles(nested(3))


def test_what_is_not_seen_to_be_deep_ends_at_a_limit_and_the_next_is_answered(monkeypatch):
    monkeypatch.setattr(module, "MAX_DEPTH", 100)
    monkeypatch.setattr(module, "_PROGRAM", module._PROGRAM.replace(f"1 + {module.MAX_SECONDS}", "1"))
    module._COMPILER.end()
    started = time.monotonic()
    assert not compiles(nested(19))
    assert time.monotonic() - started < 10
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert children < MAX_BYTES * 1.5 or children > 0
    assert compiles("x = 1")
    assert not compiles("x = = 1")


def test_long_texts_are_not_compiled():
    assert compiles("x = 1\n" * 1000)
    assert not compiles("#" * (MAX_CHARACTERS + 1))


def test_a_process_that_was_killed_is_asked_again():
    assert compiles("a = 1")
    process = module._COMPILER._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert compiles("a = 2")
    assert module._COMPILER._process is not process


def test_an_interrupted_question_leaves_no_answer_behind(monkeypatch):
    assert compiles("a = 1")
    read = module._COMPILER._process.stdout.read

    class Interrupted:
        def read(self, count: int) -> bytes:
            raise KeyboardInterrupt

        def close(self) -> None:
            pass

    module._COMPILER._process.stdout = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        compiles("a = = 1")
    assert compiles("a = 2")
    assert read is not None


@pytest.mark.parametrize(
    "text", ["\x00", "\ud800", "x = " + "(" * 500, "x = " + "9" * 10_000, "x = '\u00e9'", "", "\ufeffx = 1"]
)
def test_odd_texts_have_the_answer_of_python(text):
    def python_compiles() -> bool:
        try:
            compile(text, "f", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
        return True

    assert compiles(text) == python_compiles()


def test_no_function_of_the_standard_library_is_too_deep_or_too_long():
    """The limits take nothing from a corpus that people have written."""
    files = sorted(Path(sysconfig.get_path("stdlib"), "asyncio").glob("*.py"))
    texts = [file.read_text() for file in files]
    assert len(texts) > 20
    assert all(module._depth(text) <= MAX_DEPTH and len(text) <= MAX_CHARACTERS for text in texts)
