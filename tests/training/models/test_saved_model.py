"""A model is saved whole or not at all."""

from __future__ import annotations

import os

import pytest

from mtp_ce.training.models.build import build_model
from mtp_ce.training.models.saved import save_model


def test_a_save_that_breaks_off_leaves_no_model(small, tmp_path):
    """The weights are written, then the tokenizer fails."""

    class Broken:
        def save_pretrained(self, folder):
            assert (folder / "model.safetensors").exists()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path / "model", build_model(small()), Broken())
    assert os.listdir(tmp_path) == []
