"""The base of every group of recipe keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Group(BaseModel):
    """Named keys of a recipe. An unknown key, a value of the wrong type or out of range is an error."""

    # strict: YAML already has types, and a lax `steps: yes` would train for one step.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
