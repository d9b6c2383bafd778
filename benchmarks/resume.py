"""What a run that was cut off has left to measure: --resume.

Cases of one shape and pass are compared with each other, and only within a run. So they are left alone where one run of
the file, of this device, these sources and these packages, knows a time or a reason for each of them. Else they are
measured together again: those that are there already at the place of the first that is missing, so that the order of
importance stays.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks import results
from benchmarks.clock import BROKEN
from benchmarks.plan import Case
from benchmarks.provider import NOT_REACHED, OUT_OF_MEMORY, Provider
from benchmarks.shapes import Shape


def comparable(runs: Sequence[results.Run], kind: str, *parts: str) -> list[results.Run]:
    """The runs that have timed these parts (paths, or the training step) as a run of this moment would."""
    device, versions = results.device_name(kind), results.versions()
    return [
        run
        for run in runs
        if (run["device"], run["versions"]) == (device, versions)
        and not any(results.is_stale(run, part) for part in parts)
    ]


def left(cases: Sequence[Case], runs: Sequence[results.Run], kind: str) -> dict[Case, int]:
    """The cases that are to be measured, and the place of each."""
    known = {path: [*map(_known, comparable(runs, kind, path))] for path in results.PATHS}
    groups: dict[tuple[Shape, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.shape, case.which), []).append(case)
    places = {}
    for (shape, _), group in groups.items():
        missing = [{case.place for case in group if _key(case) not in keys} for keys in known[shape.path]]
        if set() in missing:
            continue
        # After the run that got furthest.
        place = max(map(min, missing), default=0)
        places |= {case: max(case.place, place) for case in group}
    return places


def _key(case: Case) -> results.Key:
    return results.key({"provider": case.provider.name, "pass": case.which, "shape": case.shape.as_dict()})


def _known(run: results.Run) -> set[results.Key]:
    reasons = [entry for entry in run["absent"] if entry["reason"] != NOT_REACHED]
    return {results.key(entry) for entry in (*run["cases"], *reasons)}


def breaks(provider: Provider, shape: Shape, runs: Sequence[results.Run], kind: str) -> str | None:
    """How a provider ended an earlier run: a peer is not tried again on its path, this project not at the shape."""
    for run in comparable(runs, kind, shape.path):
        for entry in run["absent"]:
            reason: str = entry["reason"]
            where = shape.as_dict() if provider.ours else {"path": shape.path}
            if reason.startswith(f"{provider.name} {BROKEN}") and where.items() <= entry["shape"].items():
                return reason
    return None


def has_host_time(name: str, runs: Sequence[results.Run], kind: str) -> bool:
    """A host time of this very commit: input checks are in it, which are in no hash."""
    now = results.commit(kind)
    known = comparable(runs, kind, *results.PATHS)
    return any(run["commit"] == now and name in run.get("host_us", {}) for run in known)


def has_ce_share(shape: Shape, runs: Sequence[results.Run], kind: str) -> bool:
    """The cross-entropy kernel's share of a linear call of this shape."""
    return any(str(shape) in run.get("ce_share", {}) for run in comparable(runs, kind, shape.path))


def has_steps(runs: Sequence[results.Run], kind: str) -> bool:
    """The training steps of all paths that memory lets be, with the largest micro-batch of each."""

    def done(entry: dict[str, Any]) -> bool:
        limit = (entry.get("largest") or {}).get("limit")
        return entry.get("reason") in (None, OUT_OF_MEMORY) and limit != NOT_REACHED

    steps = [results.steps_of(run) for run in comparable(runs, kind, results.STEP)]
    return any(entries and all(map(done, entries)) for entries in steps)
