"""A folder appears whole or not at all."""

from __future__ import annotations

import os

import pytest

from mtp_ce.training.models.build import build_model
from mtp_ce.training.models.saved import save_model
from mtp_ce.training.storage.atomic import whole_folder


def test_a_folder_appears_only_when_its_block_has_ended(tmp_path):
    with whole_folder(tmp_path / "below" / "done") as aside:
        (aside / "file").write_text("x")
        assert not (tmp_path / "below" / "done").exists()
        assert aside.parent == tmp_path / "below", "a rename across file systems is no single step"
    assert (tmp_path / "below" / "done" / "file").read_text() == "x"
    assert os.listdir(tmp_path / "below") == ["done"]


def test_a_finished_folder_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    with whole_folder(tmp_path / "done"):
        pass
    assert (tmp_path / "done").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("content", [True, False])
def test_a_folder_that_exists_is_left_as_it_is(tmp_path, content):
    (tmp_path / "done").mkdir()
    if content:
        (tmp_path / "done" / "old").write_text("keep me")
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "done") as aside:
        (aside / "new").write_text("x")
    assert os.listdir(tmp_path / "done") == (["old"] if content else [])
    assert os.listdir(tmp_path) == ["done"]


def test_a_save_that_breaks_off_leaves_no_model(small, tmp_path):
    """The weights are written, then the tokenizer fails."""

    class Broken:
        def save_pretrained(self, folder):
            assert (folder / "model.safetensors").exists()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path / "model", build_model(small()), Broken())
    assert os.listdir(tmp_path) == []
