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
        description="mlflow; none, which needs no mlflow; or a tracker of your own as package.module:Class",
    )
    uri: str = Field(default="sqlite:///mlflow.db", min_length=1, description="MLflow tracking server or database")
    experiment: str = Field(default="mtp_ce", min_length=1, description="MLflow experiment that the run belongs to")
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of a tracker of your own, stored with the recipe"
    )
