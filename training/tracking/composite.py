"""The tracking of a run: metrics.jsonl always, and the tracker of the recipe, behind one interface.

    with Tracking(recipe, folder, warn) as tracking:
        with Tracking(recipe, folder, warn, tracking, "main") as stage:
            stage.log(step, {"train/loss": 4.2})

Leaving the block finishes the run: FINISHED, KILLED on Ctrl-C or SIGTERM, FAILED on any other exception, with tags that
name the reason. A tracker that raises costs one warning; training continues and the metrics are in metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from mtp_ce.training.addresses import shown_values
from mtp_ce.training.config.recipe import flatten
from mtp_ce.training.config.schema import EvaluationRecipe, Recipe
from mtp_ce.training.config.tracking import TrackingConfig
from mtp_ce.training.tracking.jsonl import METRICS_FILE, MetricsFile
from mtp_ce.training.tracking.none import NoTracker
from mtp_ce.training.tracking.tracker import Status, Tracker, Warn, build_tracker, failure


class Tracking:
    """The metrics file and the tracker of a run or of one of its stages.

    Args:
        recipe: what the run does; its values are recorded as parameters.
        folder: the run's folder, which exists.
        warn: takes one line about a tracker or file that fails.
        whole: the tracking of the run that this is a stage of; None for the run itself.
        name: the run's name in the tracker; None means the folder's name.
        records: whether anything is written or sent; of several ranks one records.
        on_error: called first when an exception leaves the block, before the tracker is closed; stages inherit it.

    Raises:
        RecipeError: the recipe's tracker can't be built.
    """

    def __init__(
        self,
        recipe: Recipe | EvaluationRecipe,
        folder: Path,
        warn: Warn,
        whole: Tracking | None = None,
        name: str | None = None,
        records: bool = True,
        on_error: Callable[[], None] = lambda: None,
    ) -> None:
        self._file = MetricsFile(folder, warn)
        self._records = records
        self._warn = warn
        self._root: Tracking = whole._root if whole else self
        self._on_error: Callable[[], None] = whole._on_error if whole else on_error
        self._failed = False
        self._config = recipe.tracking
        self._tracker: Tracker = NoTracker(recipe.tracking)
        if not records:
            return
        name = name or folder.name
        if whole is None:
            self._tracker = build_tracker(recipe.tracking)
            with self._failures_warned():
                self._tracker.start(name, folder, warn)
        else:
            with self._failures_warned():
                self._tracker = whole._tracker.child(name, folder)
        with self._failures_warned():
            self._tracker.params(flatten(recipe))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics by name after `step` optimizer steps."""
        if not self._records:
            return
        self._file.log(step, metrics)
        with self._failures_warned():
            self._tracker.log(step, metrics)

    def recorded(self) -> tuple[int, str]:
        """Return size and SHA-256 of the metrics file, flushed to disk."""
        return self._file.recorded()

    def rewind(self, size: int, sha256: str | None) -> None:
        """Keep the first `size` bytes of the metrics file of the run that is resumed, which have this hash."""
        self._file.rewind(size, sha256)

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record figures in the tracker that are in another metrics file already."""
        with self._failures_warned():
            self._tracker.summary(step, metrics)

    def artifact(self, path: Path) -> None:
        """Attach a file to the run; it has to stay where it is until the run ends."""
        with self._failures_warned():
            self._tracker.artifact(path)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Describe the run."""
        with self._failures_warned():
            self._tracker.tags(shown_values(dict(tags)))

    @property
    def where(self) -> str:
        """Where the run can be viewed, in one line."""
        with self._failures_warned():
            return self._tracker.where()
        return METRICS_FILE

    def __enter__(self) -> Self:
        """Return the tracking, which records already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish the run with the status that the exception calls for."""
        if error is not None:
            self._on_error()
        self._file.close()
        with self._failures_warned():
            status, tags = _outcome(error)
            self._tracker.finish(status, shown_values(tags))

    @contextmanager
    def _failures_warned(self) -> Iterator[None]:
        """Turn exceptions of the tracker into one warning a run."""
        try:
            yield
        except Exception as error:  # a class of the user's own may raise anything
            if not self._root._failed:
                self._warn(
                    f"the tracker fails ({failure(error, self._config)[:160]}); training continues, metrics are in "
                    f"{METRICS_FILE}"
                )
            self._root._failed = True


def _outcome(error: BaseException | None) -> tuple[Status, dict[str, str]]:
    """Return the status of a run that ends with an exception or without one, and the tags that explain it."""
    if error is None:
        return "FINISHED", {}
    if isinstance(error, KeyboardInterrupt):
        signal = getattr(error, "signal", None)
        return "KILLED", {"stop.reason": signal.name if signal else "interrupted"}
    # A refused step knows where it happened; other exceptions have a message only.
    where = {
        f"stop.{name}": str(getattr(error, name)) for name in ("step", "quantity", "value") if hasattr(error, name)
    }
    return "FAILED", {"stop.reason": f"{type(error).__name__}: {error}", **where}


def describe_tracking(config: TrackingConfig) -> str:
    """Return the line of a dry run on tracking: where the run could be viewed, or why it could not be recorded.

    Raises:
        RecipeError: the tracker can't be built.
    """
    tracker = build_tracker(config)
    try:
        problem = tracker.check()
        return tracker.where() if problem is None else f"{problem}; training would continue with {METRICS_FILE}"
    except Exception as error:  # a class of the user's own may raise anything
        return f"the tracker can't be checked ({failure(error, config)}); training would continue"
