"""Recipe keys of experiment tracking."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mtp_ce.training.config.group import Group


class TrackingConfig(Group):
    """Where metrics are recorded in addition to metrics.jsonl in the run directory."""

    kind: Literal["mlflow", "none"] = Field(default="mlflow", description="none works without mlflow installed")
    uri: str = Field(default="sqlite:///mlflow.db", min_length=1, description="MLflow tracking server or database")
    experiment: str = Field(default="mtp_ce", min_length=1, description="MLflow experiment that the run belongs to")
