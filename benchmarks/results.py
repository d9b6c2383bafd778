"""The results files: benchmarks/results/<device>.json, written with --results.

A file holds runs. A run is one session: when, with which versions, commit and kernel sources, the copy bandwidth of the
device in that session, its cases, the providers that were absent, numbers beside them (`BESIDE`), and its training
steps (`steps`, see training_step.py). Cases are compared within a run only, since only there they share a
machine in one state. A new run takes the place of older results of the same cases (provider, pass, shape), of the same
numbers, and one with steps of all older steps; older runs keep the rest, and vanish when nothing is left of them.
Paths and host names are nowhere in a file.

A case holds p20, p50 and p80 of its rounds. Ratios and shares are of p20: what disturbs a round only ever makes it
longer, by a factor of 4 where a shared machine has to find fresh pages.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.provider import NOT_REACHED

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# A file of another format is as good as none: its cases are not those of today's report.
FORMAT = 2
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels")
# What is timed on a path, by the kind of device. Input checks in front of it are not part of it.
_LINEAR = ("mtp_ce/linear.py", "mtp_ce/ops/linear.py", "mtp_ce/ops/register.py", "mtp_ce/ops/chunks.py")
_LOGITS = ("mtp_ce/ops/register.py", "mtp_ce/ops/logits.py")
_STEP = (*_LINEAR, "mtp_ce/ops/logits.py", "mtp_ce/heads/residual.py", "mtp_ce/unembedding.py", "mtp_ce/hf/wrapper.py")
SOURCES = {
    kind: {
        "logits": (engine, "mtp_ce/ops/register.py", "mtp_ce/ops/logits.py"),
        "linear": (engine, *_LINEAR),
        "step": (engine, *_STEP),
    }
    for kind, engine in (("cpu", "mtp_ce/ops/cpu.py"), ("cuda", "kernels/*.py"))
}
PATHS = ("linear", "logits", "token_ce")
STEP = "step"
# What a run has beside its cases: numbers by name.
BESIDE = ("host_us", "ce_share")

Run = dict[str, Any]
Key = tuple[str, ...]


def device_name(kind: str) -> str:
    """The device in words: "2-core CPU", or what CUDA calls the GPU."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{len(os.sched_getaffinity(0))}-core CPU"


def results_path(kind: str, folder: Path = RESULTS) -> Path:
    """The file of this machine's kind of device: cpu-2core.json, nvidia-h100-80gb-hbm3.json."""
    if kind == "cuda":
        slug = re.sub(r"[^a-z0-9]+", "-", device_name(kind).lower()).strip("-")
    else:
        slug = f"cpu-{len(os.sched_getaffinity(0))}core"
    return folder / f"{slug}.json"


def source_files(kind: str, path: str, root: Path = ROOT) -> list[Path]:
    """The files that decide how fast a path is on a device of this kind."""
    patterns = SOURCES[kind]["linear" if path == "token_ce" else path]
    return sorted(file for pattern in patterns for file in root.glob(pattern))


def source_hash(kind: str, path: str, root: Path = ROOT) -> str:
    """SHA-256 of the names and the bytes of `source_files`."""
    digest = hashlib.sha256()
    for file in source_files(kind, path, root):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def is_stale(run: Run, path: str, root: Path = ROOT) -> bool:
    """The sources of a path are no longer those that the run has timed."""
    return bool(run["source_hash"][path] != source_hash(run["kind"], path, root))


def commit(kind: str) -> str | None:
    """The commit that was timed, "+" behind it where its sources were changed; None outside a clone.

    MTP_CE_COMMIT stands in for git where only a copy of the tree is at hand.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        sources = {str(file) for path in (*PATHS, STEP) for file in source_files(kind, path)}
        changed = git("status", "--porcelain", "--", *sorted(sources))
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MTP_CE_COMMIT")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Of everything that is timed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def new_run(kind: str, copy_bandwidth: float) -> Run:
    """A run without cases and steps."""
    return {
        "device": device_name(kind),
        "kind": kind,
        "measured": datetime.now(UTC).isoformat(timespec="minutes"),
        "versions": versions(),
        "commit": commit(kind),
        "source_hash": {path: source_hash(kind, path) for path in (*PATHS, STEP)},
        "copy_bytes_per_s": round(copy_bandwidth),
        "cases": [],
        "absent": [],
        "steps": [],
    }


def percentile(ordered: list[float], share: float) -> float:
    """The value below which this share lies, linear between neighbours."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def timing(seconds: Iterable[float], ceiling: float | None) -> dict[str, float | None]:
    """What a case says about its time; the ceiling is the seconds of what the work can't do without."""
    ordered = sorted(seconds)
    p20, p50, p80 = (percentile(ordered, share) for share in (0.2, 0.5, 0.8))
    return {
        "rounds": len(ordered),
        "p20_ms": round(p20 * 1e3, 5),
        "p50_ms": round(p50 * 1e3, 5),
        "p80_ms": round(p80 * 1e3, 5),
        "ceiling_ms": None if ceiling is None else round(ceiling * 1e3, 5),
        "share_of_ceiling": None if ceiling is None else round(ceiling / p20, 4),
    }


def key(entry: dict[str, Any]) -> Key:
    """What makes a case, or an absence, the same one in another run."""
    return entry["provider"], entry["pass"], json.dumps(entry["shape"], sort_keys=True)


def steps_of(run: Run) -> list[dict[str, Any]]:
    """The training steps of a run; a file may be older than they are."""
    steps: list[dict[str, Any]] = run.get("steps", [])
    return steps


def stale_parts(run: Run) -> list[str]:
    """What the run has timed whose sources have changed since."""
    cases = PATHS if run["cases"] or not steps_of(run) else ()
    return [path for path in (*cases, *([STEP] if steps_of(run) else [])) if is_stale(run, path)]


def merged(runs: list[Run], run: Run) -> list[Run]:
    """The runs of a file once `run` has joined them."""
    measured = {key(case) for case in run["cases"]}
    # No time left says nothing about a reason.
    known = measured | {key(entry) for entry in run["absent"] if entry["reason"] != NOT_REACHED}
    kept = []
    for old in runs:
        cases = [case for case in old["cases"] if key(case) not in measured]
        steps = [] if steps_of(run) else steps_of(old)
        beside = {
            part: {name: value for name, value in old.get(part, {}).items() if name not in run.get(part, {})}
            for part in BESIDE
        }
        any_case = cases or any(beside.values())
        absent = [entry for entry in old["absent"] if any_case and key(entry) not in known]
        if any_case or steps:
            kept.append({**old, "cases": cases, "absent": absent, "steps": steps, **beside})
    return [*kept, run]


def read(path: Path) -> list[Run]:
    """The runs of a file; none where there is no file, or one of another format."""
    held = json.loads(path.read_text()) if path.exists() else {}
    return held["runs"] if held.get("format") == FORMAT else []


def write(path: Path, runs: list[Run]) -> None:
    """Write a results file."""
    write_json(path, {"format": FORMAT, "runs": runs})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file in one step, so that a run that is cut off leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)
