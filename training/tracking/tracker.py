"""The protocol of a tracker, and the table of trackers that a recipe can name.

    tracker = build_tracker(recipe.tracking)          the class of tracking.kind
    tracker.start("tiny-20261128", folder, warn)      from here on it records
    stage = tracker.child("main", folder)             the run of a stage, recorded too
    stage.log(10, {"train/loss": 4.2})
    stage.finish("FINISHED", {})
    tracker.finish("FINISHED", {})

To add a tracker, write one file and one line in `TRACKERS`, or name a class of your own in the recipe as
`package.module:Class`. Nothing here imports torch or mlflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from mtp_ce.registry import load_class
from mtp_ce.training.addresses import shown, shown_values
from mtp_ce.training.config.tracking import TrackingConfig
from mtp_ce.training.errors import RecipeError

Status = Literal["FINISHED", "FAILED", "KILLED"]

# Takes one line about a tracker that fails.
Warn = Callable[[str], None]

TRACKERS = {
    "mlflow": "mtp_ce.training.tracking.mlflow:MlflowTracker",
    "none": "mtp_ce.training.tracking.none:NoTracker",
}


class Tracker(Protocol):
    """Records one run: a whole run, or one of its stages as a child of it.

    The trainer calls `Class(config, **config.options)` with the recipe's `tracking` group, before it writes anything:
    the constructor checks its options and opens nothing. An exception from a later call is one warning and never ends
    the run. Methods are called from the thread that trains, so a method that waits for a network delays training.
    """

    def where(self) -> str:
        """Return one line that tells a person where the run can be viewed, without passwords."""

    def check(self) -> str | None:
        """Return one line on why nothing could be recorded, for `--dry-run`; None if no problem was found."""

    def start(self, name: str, folder: Path, warn: Warn) -> None:
        """Open the run.

        Args:
            name: the run's name.
            folder: the run directory, which exists. A resumed run is started again in the same folder.
            warn: takes one line for the person who watches the run; any thread may call it.
        """

    def child(self, name: str, folder: Path) -> Tracker:
        """Return the started tracker of a stage.

        Args:
            name: the stage's name.
            folder: the stage's folder; that of the main stage is the run directory itself.
        """

    def params(self, params: Mapping[str, Any]) -> None:
        """Record the recipe's values by dotted key."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics after `step` optimizer steps; a value may be NaN or infinite."""

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record final figures of the run, which a stage or an earlier run has logged already."""

    def tags(self, tags: Mapping[str, str]) -> None:
        """Record words about the run."""

    def artifact(self, path: Path) -> None:
        """Record a file, which stays where it is until the run ends."""

    def finish(self, status: Status, tags: Mapping[str, str]) -> None:
        """Close the run.

        Args:
            status: FINISHED; KILLED on Ctrl-C or SIGTERM; FAILED on any other exception.
            tags: why the run ended early.
        """


def build_tracker(config: TrackingConfig) -> Tracker:
    """Build the tracker that a recipe names; it records nothing until it is started.

    Raises:
        RecipeError: `tracking.kind` names no tracker, its module can't be imported, or it refuses its options.
    """
    try:
        tracker_class = load_class(config.kind, TRACKERS, "tracking.kind")
    except ValueError as error:
        raise RecipeError(_one_line(error)) from None
    try:
        tracker: Tracker = tracker_class(config, **config.options)
    except RecipeError:
        raise
    except Exception as error:  # a class of the user's own may raise anything
        raise RecipeError(
            f"tracking.kind '{config.kind}' does not accept tracking.options ({failure(error, config)})"
        ) from None
    return tracker


def failure(error: Exception, config: TrackingConfig) -> str:
    """Format a tracker's exception as a line: its kind alone if an address has a part that may not be shown."""
    kind, options = type(error).__name__, config.model_dump()
    # Clients quote an address whole and in parts, which can't all be recognised.
    if shown_values(options) != options:
        return kind
    return f"{kind}: {shown(_one_line(error))}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
