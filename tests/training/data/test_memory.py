"""What a run holds of its corpus does not grow with it: peak memory of two processes, one with much more text.

The peak is that of the whole process (ru_maxrss), so it counts the pages of mapped files, too.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

# Everything before the first step of a run, and the batches of 20 steps; of each file in turn.
PROGRAM = """
import resource, sys
from rich.console import Console
from mtp_ce.training.data.rows import rows_of_step
from mtp_ce.training.run.inputs import read_inputs
from mtp_ce.training.config.recipe import load_recipe

small = ["data.vocab_size=512", "data.sequence_length=256", "train.batch_size=8", "tracking.kind=none"]
for file in sys.argv[1:]:
    recipe = load_recipe("tiny", [*small, f"data.corpus={file}"])
    inputs = read_inputs(recipe, Console(quiet=True))
    rows = inputs.rows(inputs.tokens.train)
    for step in range(20):
        batch = rows.batch(rows_of_step(step, 8, len(rows), seed=0))
    assert batch.input_ids.shape == (8, 256)
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, inputs.tokens.train.token_count)
"""


def write_rows(path: Path, megabytes: int) -> None:
    """Rows of about 1 kB that all differ, 10^6 bytes a megabyte."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(2000)]
    texts = [" ".join(draw.choices(words, k=160)) for _ in range(1000)]
    written = number = 0
    with path.open("w") as file:
        while written < megabytes * 1e6:
            number += 1
            written += file.write(f'{{"id": {number}, "text": "{number}: {texts[number % 1000]}"}}\n')


def peaks(cache: Path, *files: Path) -> list[float]:
    """Peak memory of a process that reads files, after each of them; 10^6 bytes."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", PROGRAM, *map(str, files)]
    run = subprocess.run(program, capture_output=True, text=True, check=True, env=environment)
    found = []
    for file, line in zip(files, run.stdout.splitlines(), strict=True):
        megabytes, tokens = line.split()
        assert int(tokens) > 0.25 * file.stat().st_size, "all of the file was read"
        found.append(float(megabytes))
    return found


def test_peak_memory_hardly_grows_with_the_corpus(tmp_path):
    """The second file is 40 MB as text and 60 as tokens; the pages of a map that 20 batches read may be 40."""
    for size in (4, 40):
        write_rows(tmp_path / f"{size}.jsonl", size)
    few, many = peaks(tmp_path / "cache", tmp_path / "4.jsonl", tmp_path / "40.jsonl")
    assert many - few < 85


@pytest.mark.slow
def test_peak_memory_hardly_grows_with_two_gigabytes(tmp_path):
    """Row numbers are shuffled, 8 bytes for each 256 tokens, some 25 MB here: that is what grows, beside read pages."""
    for size in (20, 2000):
        write_rows(tmp_path / f"{size}.jsonl", size)
    (few,) = peaks(tmp_path / "cache", tmp_path / "20.jsonl")
    (many,) = peaks(tmp_path / "cache", tmp_path / "2000.jsonl")
    (read,) = peaks(tmp_path / "cache", tmp_path / "2000.jsonl")
    print(f"\n20 MB: peak {few:.0f} MB; 2 GB: {many:.0f} MB, and {read:.0f} MB where the tokens are in the cache")
    assert max(many, read) - few < 200
