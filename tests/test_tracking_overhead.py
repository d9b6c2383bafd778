"""The benchmark of tracking's cost: it counts every step once, and a pair of real runs goes through it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_a_slow_window_counts_by_its_steps(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.tracking_overhead import figures

    windows = [
        {"step": 1, "perf/tokens_per_s": 100.0, "time": 50.0},
        {"step": 20, "perf/tokens_per_s": 1000.0, "time": 52.0},
        {"step": 40, "perf/tokens_per_s": 500.0, "time": 57.5},
    ]
    # 10 tokens a step: 0.1 s, 0.19 s and 0.4 s.
    assert figures(windows).tokens_per_s == pytest.approx(400 / (0.1 + 0.19 + 0.4))
    assert figures(windows).wall_s == 7.5


def test_a_pair_of_runs_is_measured_and_nothing_stays(tmp_path):
    corpus = Path(sysconfig.get_path("stdlib")) / "email"
    small = [
        "tiny", f"data.corpus={corpus}", "data.holdout_fraction=0.2", "data.vocab_size=300", "data.sequence_length=32",
        "train.steps=4", "optimizer.warmup_steps=1", "train.log_every=2", "validation.rows=2", "train.device=cpu",
    ]  # fmt: skip
    made_by_runs = [ROOT / "runs", ROOT / "mlflow.db"]
    before = [path.exists() for path in made_by_runs]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tracking_overhead", "--pairs", "1", *small],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    asked, header, pair, result = done.stdout.splitlines()
    assert asked.startswith("train-mtp validation.every=null ")
    assert asked.endswith("train.device=cpu")
    assert header.startswith("pair")
    numbers = [float(number.replace(",", "")) for number in pair.split()]
    assert numbers[0] == 1
    assert numbers[3] == pytest.approx(numbers[1] / numbers[2], abs=0.01)
    assert result.startswith(f"median of 1 pairs: throughput {numbers[3]:.3f} times")
    assert "runs" not in {path.name for path in tmp_path.iterdir()}
    assert [path.exists() for path in made_by_runs] == before
