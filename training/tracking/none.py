"""The tracker that records nothing: `tracking.kind: none`. metrics.jsonl is written all the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_ce.training.config.tracking import TrackingConfig
from mtp_ce.training.tracking.jsonl import METRICS_FILE
from mtp_ce.training.tracking.tracker import Status, Tracker, Warn


class NoTracker:
    """Implements every method of a tracker as a no-op. A tracker may inherit from it and override what it records.

    Args:
        config: the recipe's `tracking` group.
    """

    def __init__(self, config: TrackingConfig) -> None:
        self.config = config

    def where(self) -> str:
        """Return where the metrics are."""
        return f"none; metrics go to {METRICS_FILE}"

    def check(self) -> str | None:
        """Return None: there is nothing to reach."""
        return None

    def start(self, name: str, folder: Path, warn: Warn) -> None:
        """Open nothing."""

    def child(self, name: str, folder: Path) -> Tracker:
        """Return itself: stages are not told apart. A tracker that records overrides this."""
        return self

    def params(self, params: Mapping[str, Any]) -> None:
        """Record nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record nothing."""

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record nothing."""

    def tags(self, tags: Mapping[str, str]) -> None:
        """Record nothing."""

    def artifact(self, path: Path) -> None:
        """Record nothing."""

    def finish(self, status: Status, tags: Mapping[str, str]) -> None:
        """Close nothing."""
