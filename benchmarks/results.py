"""The results files: benchmarks/results/<device>.json, written with --results.

A file holds runs. A run is one session: when, with which versions, commit and hash of the timed sources, the copy
bandwidth of the device, its cases, the absent peers, the host time of a call (`host_us`) and its training steps
(`steps`). Ratios are of one run, since only there the cases meet the machine in one state. A new run replaces older
results of the same cases; older runs keep the rest. A file contains no path and no host name.

A case holds p20, p50 and p80 of its rounds. Ratios and shares are of p20: what disturbs a round only makes it longer,
by a factor of 4 where a shared machine has to find fresh pages.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Files of another format are not read.
FORMAT = 2
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels")
# What is timed, by part of a run: the operators, on a GPU with the kernels, and for a training step the model around.
SOURCES = {
    "cpu": {"loss": ("mtp_ce/ops/*.py",), "step": ("mtp_ce/ops/*.py", "mtp_ce/heads/*.py", "mtp_ce/hf/*.py")},
    "cuda": {
        "kernels": ("kernels/*.py",),
        "loss": ("kernels/*.py", "mtp_ce/ops/*.py"),
        "step": ("kernels/*.py", "mtp_ce/ops/*.py", "mtp_ce/heads/*.py", "mtp_ce/hf/*.py"),
    },
}

Run = dict[str, Any]


def device_name(kind: str) -> str:
    """Return "2-core CPU", or what CUDA calls the GPU."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{len(os.sched_getaffinity(0))}-core CPU"


def results_path(kind: str, folder: Path = RESULTS) -> Path:
    """Return the file of this device: cpu-2core.json, nvidia-h100-80gb-hbm3.json."""
    if kind == "cuda":
        slug = re.sub(r"[^a-z0-9]+", "-", device_name(kind).lower()).strip("-")
    else:
        slug = f"cpu-{len(os.sched_getaffinity(0))}core"
    return folder / f"{slug}.json"


def source_files(kind: str, part: str, root: Path = ROOT) -> list[Path]:
    """Return the files that are timed, relative to the root."""
    return sorted({file.relative_to(root) for pattern in SOURCES[kind][part] for file in root.glob(pattern)})


def source_hash(kind: str, part: str, root: Path = ROOT) -> str:
    """Return the SHA-256 of the names and the bytes of the timed files."""
    digest = hashlib.sha256()
    for file in source_files(kind, part, root):
        digest.update(f"{file}\n".encode() + (root / file).read_bytes())
    return digest.hexdigest()


def is_stale(run: Run, part: str = "loss", root: Path = ROOT) -> bool:
    """Whether the sources have changed since the run timed them."""
    return bool(run["source_hash"].get(part) != source_hash(run["kind"], part, root))


def commit(kind: str) -> str | None:
    """Return the timed commit, with "+" where its sources were changed; None outside a clone.

    MTP_CE_COMMIT replaces git where only a copy of the tree is at hand.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", *map(str, source_files(kind, "step")))
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MTP_CE_COMMIT")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def new_run(kind: str, copy_bandwidth: float) -> Run:
    """Return a run without cases."""
    return {
        "device": device_name(kind),
        "kind": kind,
        "measured": datetime.now(UTC).isoformat(timespec="minutes"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": commit(kind),
        "source_hash": {part: source_hash(kind, part) for part in SOURCES[kind]},
        "copy_bytes_per_s": round(copy_bandwidth),
        "cases": [],
        "absent": [],
        "host_us": {},
        "steps": [],
    }


def is_resumable(older: list[Run], run: Run) -> bool:
    """Whether the newest run was of the same device, with the same versions, sources and commit."""
    same = ("device", "versions", "commit", "source_hash")
    return bool(older) and all(older[-1][name] == run[name] for name in same)


def percentile(values: list[float], share: float) -> float:
    """Return the value below which this share lies, linear between neighbours."""
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), share))


def timing(seconds: list[float], ceiling: float | None) -> dict[str, float | None]:
    """Return a case's percentiles; the ceiling is the seconds of what the work cannot do without."""
    p20, p50, p80 = (percentile(seconds, share) for share in (0.2, 0.5, 0.8))
    return {
        "rounds": len(seconds),
        "p20_ms": round(p20 * 1e3, 5),
        "p50_ms": round(p50 * 1e3, 5),
        "p80_ms": round(p80 * 1e3, 5),
        "ceiling_ms": None if ceiling is None else round(ceiling * 1e3, 5),
        "share_of_ceiling": None if ceiling is None else round(ceiling / p20, 4),
    }


def key(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the identity of a case, or of an absence, over runs."""
    return entry["provider"], entry["pass"], json.dumps(entry["shape"], sort_keys=True)


def merged(runs: list[Run], run: Run) -> list[Run]:
    """Return the runs of a file with `run` added: older runs lose what it measured again."""
    measured = {key(case) for case in run["cases"]}
    known = measured | {key(entry) for entry in run["absent"]}
    kept = []
    for old in runs:
        cases = [case for case in old["cases"] if key(case) not in measured]
        host = {name: value for name, value in old.get("host_us", {}).items() if name not in run["host_us"]}
        steps = [] if run["steps"] else old["steps"]
        if cases or host or steps:
            absent = [entry for entry in old["absent"] if cases and key(entry) not in known]
            kept.append({**old, "cases": cases, "absent": absent, "steps": steps, "host_us": host})
    return [*kept, run]


def read(path: Path) -> list[Run]:
    """Return the runs of a file; none where there is no file, or one of another format."""
    content = json.loads(path.read_text()) if path.exists() else {}
    return content["runs"] if content.get("format") == FORMAT else []


def write(path: Path, runs: list[Run]) -> None:
    """Write a results file in one step, so that an interrupted run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"format": FORMAT, "runs": runs}, indent=1) + "\n")
    aside.replace(path)
