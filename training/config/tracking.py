"""Recipe keys of experiment tracking."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mtp_ce.training.config.group import Group


class TrackingConfig(Group):
    """Where metrics are recorded in addition to metrics.jsonl in the run directory."""

    kind: str = Field(
        default="mlflow",
        min_length=1,
        description="mlflow; none, which needs no mlflow; or your own tracker as package.module:Class",
    )
    uri: str | None = Field(
        default=None,
        min_length=1,
        description="MLflow tracking server or database; null: MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db",
    )
    experiment: str | None = Field(
        default=None,
        min_length=1,
        description="MLflow experiment that the run belongs to; null: MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, "
        "or else mtp_ce",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of your own tracker, stored with the recipe"
    )
