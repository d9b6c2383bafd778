"""What is kept is complete on disk or absent, and says so when it is damaged."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage import atomic, cache
from mtp_ce.training.storage.atomic import MANIFEST, LazyFile, damage, remove_strays, whole_folder, write_file
from mtp_ce.training.storage.cache import cache_folder, cached


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
    assert (tmp_path / "done").stat().st_mode == (tmp_path / "plain").stat().st_mode & ~stat.S_IWOTH


@pytest.mark.parametrize("content", [True, False])
def test_a_folder_that_exists_is_left_as_it_is(tmp_path, content):
    (tmp_path / "done").mkdir()
    if content:
        (tmp_path / "done" / "old").write_text("keep me")
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "done") as aside:
        (aside / "new").write_text("x")
    assert os.listdir(tmp_path / "done") == (["old"] if content else [])
    assert os.listdir(tmp_path) == ["done"]


def test_what_is_replaced_stays_until_the_new_one_is_complete(tmp_path):
    for text in ("old", "new"):
        with whole_folder(tmp_path / "model", replace=True) as aside:
            (aside / "file").write_text(text)
    write_file(tmp_path / "run.json", "old")

    def break_off() -> None:
        with whole_folder(tmp_path / "model", replace=True) as aside:
            (aside / "file").write_text("newest")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        break_off()
    with pytest.raises(UnicodeEncodeError):
        write_file(tmp_path / "run.json", "\ud800")
    assert (tmp_path / "model" / "file").read_text() == "new"
    assert (tmp_path / "run.json").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["model", "run.json"]


def test_all_is_on_disk_before_the_name_is_and_the_old_one_is_deleted_last(tmp_path, monkeypatch):
    """A power cut may lose any write that was not flushed, and none that was."""
    events = []

    def noted(name, function, shown):
        def call(*arguments, **options):
            events.append((name, shown(*arguments)))
            return function(*arguments, **options)

        return call

    def path_of(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    (tmp_path / "run").mkdir()
    with whole_folder(tmp_path / "run", replace=True) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "file").write_text("x")
        monkeypatch.setattr(os, "fsync", noted("flush", os.fsync, path_of))
        monkeypatch.setattr(Path, "rename", noted("rename", Path.rename, lambda path, target: Path(target).name))
        monkeypatch.setattr(atomic.shutil, "rmtree", noted("delete", atomic.shutil.rmtree, lambda path: "old"))
        hidden = aside.name
    flushed = [name for kind, name in events[: events.index(("rename", "run"))] if kind == "flush"]
    assert sorted(flushed) == sorted([MANIFEST, "inner", "file", hidden])
    after = events[events.index(("rename", "run")) :]
    assert after[:3] == [("rename", "run"), ("flush", tmp_path.name), ("delete", "old")]


WRITER = """
import sys, time
from pathlib import Path
from mtp_ce.training.storage.atomic import whole_folder
with whole_folder(Path(sys.argv[1])) as aside:
    (aside / "half").write_text("x")
    print(aside.name, flush=True)
    time.sleep(100)
"""


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    writer = [sys.executable, "-c", WRITER, str(tmp_path / "model")]
    with subprocess.Popen(writer, stdout=subprocess.PIPE, text=True) as living:
        name = living.stdout.readline().strip()
        (tmp_path / ".user.settings").write_text("not ours")
        remove_strays(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted([name, ".user.settings"])
        living.send_signal(signal.SIGKILL)
        living.wait()
    remove_strays(tmp_path, "other")
    assert (tmp_path / name).exists(), "of another name"
    with whole_folder(tmp_path / "model"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".user.settings", "model"]


@pytest.fixture
def kept(tmp_path) -> Path:
    with whole_folder(tmp_path / "kept") as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "weights").write_bytes(bytes(1000))
        (aside / "config").write_text("{}")
    return tmp_path / "kept"


def change(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    match how:
        case "flip":
            content[len(content) // 2] ^= 1
        case "cut":
            del content[-1]
        case "zeros":
            content[:] = bytes(len(content))
        case "grown":
            content += b" "
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flip", "cut", "zeros", "grown"])
@pytest.mark.parametrize("name", ["config", "inner/weights", MANIFEST])
def test_every_change_of_a_kept_folder_is_found(kept, name, how):
    assert damage(kept) is None
    atomic._verified.clear()
    before = (kept / name).read_bytes()
    change(kept / name, how)
    if (kept / name).read_bytes() == before or (name == MANIFEST and how == "grown"):
        assert damage(kept) is None, "a space after the manifest changes nothing"
    else:
        assert damage(kept)


def test_every_bit_of_a_manifest_is_found_or_changes_nothing(kept):
    content = (kept / MANIFEST).read_bytes()
    whole = atomic.read_manifest(kept)
    for bit in range(len(content) * 8):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (kept / MANIFEST).write_bytes(damaged)
        atomic._verified.clear()
        assert damage(kept) or atomic.read_manifest(kept) == whole, bit


def test_a_file_that_is_missing_or_one_too_many_is_named(kept):
    (kept / "more").write_text("x")
    assert damage(kept) == "more does not belong to it"
    (kept / "more").unlink()
    (kept / "config").unlink()
    assert damage(kept) == "config is missing"


def test_a_large_file_is_verified_chunk_by_chunk_as_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "CHUNK", 100)
    monkeypatch.setattr(atomic, "LAZY", 500)
    with whole_folder(tmp_path / "kept") as aside:
        (aside / "tokens").write_bytes(bytes(range(256)) * 4)
    content = bytearray((tmp_path / "kept" / "tokens").read_bytes())
    content[250] ^= 1
    (tmp_path / "kept" / "tokens").write_bytes(content)
    assert damage(tmp_path / "kept", lazy=True) is None
    atomic._verified.clear()
    assert damage(tmp_path / "kept") == "tokens differs from what was written"

    def refuse(reason: str) -> None:
        raise RecipeError(reason)

    file = LazyFile(tmp_path / "kept", "tokens", refuse)
    file.check([0, 1, 3, 10])
    assert file.pending == {2, 4, 5, 6, 7, 8, 9}
    with pytest.raises(RecipeError, match="tokens differs from what was written"):
        file.check([1, 2])


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder() / "tokens" / "abc"


def make(aside: Path) -> None:
    (aside / "data").write_text("right")


def test_a_damaged_entry_is_made_again_with_one_line(own_cache, caplog):
    assert cached(own_cache, make) == own_cache
    assert cached(own_cache, lambda aside: pytest.fail("it is there")) == own_cache
    (own_cache / "data").write_text("wrong")
    atomic._verified.clear()
    cached(own_cache, make)
    assert (own_cache / "data").read_text() == "right"
    (line,) = caplog.messages
    assert line == f"cache entry {own_cache} is damaged (data differs from what was written); it is made again"


def test_an_entry_of_another_user_is_refused(own_cache, monkeypatch):
    cached(own_cache, make)
    own_cache.chmod(0o777)
    with pytest.raises(RecipeError, match=r"abc can be written by every user; run chmod -R o-w"):
        cached(own_cache, make)
    monkeypatch.setattr(cache.os, "getuid", lambda: 12345)
    with pytest.raises(RecipeError, match=r"belongs to another user \(uid \d+\).*set XDG_CACHE_HOME"):
        cached(own_cache, make)


def test_a_cache_that_can_not_be_written_is_one_line(own_cache, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(RecipeError, match=r"cache .*can't be written \(.*\); set XDG_CACHE_HOME"):
        cached(own_cache, make)


def test_an_error_of_what_is_read_is_not_taken_for_one_of_the_cache(own_cache, tmp_path):
    def unreadable(aside: Path) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "corpus.txt"))

    with pytest.raises(PermissionError):
        cached(own_cache, unreadable)
    assert [path.name for path in own_cache.parent.iterdir()] == ["abc.lock"]
