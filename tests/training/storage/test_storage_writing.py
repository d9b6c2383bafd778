"""Writes to S3: a folder is complete or absent, its manifest comes last, and training never waits."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.folders import (
    MANIFEST,
    UNFINISHED,
    check_free,
    complete_folders,
    delete_folder,
    fetch_folder,
    upload_folder,
)
from mtp_ce.training.storage.s3 import READ_S
from mtp_ce.training.storage.uploads import Uploads


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three files, one of them below."""
    made = tmp_path / "model"
    (made / "deep").mkdir(parents=True)
    (made / "model.bin").write_bytes(os.urandom(9000))
    (made / "deep" / "notes.txt").write_text("some notes")
    (made / "empty").touch()
    return made


@pytest.fixture
def large(folder) -> Path:
    """The same with a file that goes in two parts."""
    (folder / "model.bin").write_bytes(os.urandom(9 << 20))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name, but the list of files that every entry of the cache has."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".mtp_files.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def names(client, prefix: str) -> set[str]:
    found = client.list_objects_v2(Bucket="models", Prefix=f"{prefix}/").get("Contents", [])
    return {item["Key"].removeprefix(f"{prefix}/") for item in found}


def writes(proxy) -> list[str]:
    """What was put and deleted, in order: PUT name, DELETE name."""
    found = [re.match(r"(PUT|POST|DELETE) /models/[^/]+/([^ ?]+)(\?\S*)? ", head) for head in proxy.asked]
    return [f"{one[1]} {one[2]}{' part' if one[3] else ''}" for one in found if one]


def test_a_folder_comes_back_as_it_was_and_its_manifest_is_written_last(s3, proxy, large, prefix):
    upload_folder("DIR", large, f"s3://models/{prefix}")
    assert contents(fetch_folder("model.source", f"s3://models/{prefix}")) == contents(large)
    done = writes(proxy)
    assert done[0] == f"PUT {UNFINISHED}"
    assert done[-2:] == [f"PUT {MANIFEST}", f"DELETE {UNFINISHED}"]
    assert sum(line == "PUT model.bin part" for line in done) == 2, "in parts of 8 MiB"
    assert names(s3, prefix) == {*contents(large), MANIFEST}
    manifest = json.loads(s3.get_object(Bucket="models", Key=f"{prefix}/{MANIFEST}")["Body"].read())
    assert manifest["files"] == {
        name: {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in contents(large).items()
    }


# An object that is replaced or deleted (None) after the upload, and the message, if this is an error.
DIFFERENT = [
    ("old.bin", b"of an earlier upload", None),
    ("model.bin", b"short", r"'model\.bin' has 5 bytes and 9,000 in its manifest; upload it again"),
    ("model.bin", bytes(9000), r"model\.bin' has other content than its manifest says; upload it again"),
    ("model.bin", None, r"'model\.bin' is in its manifest but not in the bucket; upload it again"),
    (MANIFEST, b'{"files": ["model.bin"]}', rf"its {MANIFEST} is damaged; upload it again"),
]


def test_a_folder_is_what_its_manifest_says_or_an_error_of_one_line(s3, folder, prefix):
    for name, body, words in DIFFERENT:
        upload_folder("DIR", folder, f"s3://models/{prefix}", overwrite=True)
        if body is None:
            s3.delete_object(Bucket="models", Key=f"{prefix}/{name}")
        else:
            s3.put_object(Bucket="models", Key=f"{prefix}/{name}", Body=body)
        if words is None:
            assert contents(fetch_folder("model.source", f"s3://models/{prefix}")) == contents(folder)
            continue
        with pytest.raises(RecipeError, match=words) as raised:
            fetch_folder("model.source", f"s3://models/{prefix}")
        assert "\n" not in str(raised.value)


def test_an_upload_that_was_stopped_is_no_folder_and_can_be_repeated(s3, folder, prefix):
    stop = threading.Event()
    stop.set()
    with pytest.raises(RecipeError, match="can't be written: stopped before its end"):
        upload_folder("DIR", folder, f"s3://models/{prefix}", stop=stop)
    assert MANIFEST not in names(s3, prefix)
    with pytest.raises(RecipeError, match="its upload is incomplete; upload it again"):
        fetch_folder("model.source", f"s3://models/{prefix}")
    check_free("DIR", f"s3://models/{prefix}")
    upload_folder("DIR", folder, f"s3://models/{prefix}")
    assert contents(fetch_folder("model.source", f"s3://models/{prefix}")) == contents(folder)


def test_what_exists_is_refused_unless_it_is_to_be_replaced(s3, proxy, folder, prefix):
    """Another folder, complete, and objects of other tools."""
    upload_folder("DIR", folder, f"s3://models/{prefix}")
    s3.put_object(Bucket="models", Key=f"{prefix}-foreign/theirs", Body=b"theirs")
    for address in (f"s3://models/{prefix}", f"s3://models/{prefix}-foreign"):
        message = f"DIR '{address}' can't be written: there are objects at this address already; name another one"
        with pytest.raises(RecipeError, match=message):
            check_free("DIR", address)
        with pytest.raises(RecipeError, match=message):
            upload_folder("DIR", folder, address)
    assert names(s3, f"{prefix}-foreign") == {"theirs"}
    (folder / "model.bin").write_bytes(b"another one")
    proxy.asked.clear()
    upload_folder("DIR", folder, f"s3://models/{prefix}", overwrite=True)
    assert writes(proxy)[:2] == [f"PUT {UNFINISHED}", f"DELETE {MANIFEST}"], "it is never half of each"
    assert contents(fetch_folder("model.source", f"s3://models/{prefix}")) == contents(folder)


@pytest.mark.parametrize("same", [False, True])
def test_of_two_uploads_to_one_address_the_second_to_end_is_refused(conditions, folder, prefix, tmp_path, same):
    """The other ends while this one is under way; with the same files, it may be this one, whose response was lost."""
    others = [folder if same else small(tmp_path, 1)]
    expected = contents(others[0])
    opened = Path.open

    def meanwhile(path, *given, **named):
        if path.name == "model.bin" and others:
            upload_folder("DIR", others.pop(), f"s3://models/{prefix}")
        return opened(path, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", meanwhile)
        with (
            nullcontext()
            if same
            else pytest.raises(RecipeError, match="another upload to this address has ended meanwhile")
        ):
            upload_folder("DIR", folder, f"s3://models/{prefix}")
    assert contents(fetch_folder("model.source", f"s3://models/{prefix}")) == expected


def test_an_upload_survives_a_broken_connection(s3, proxy, large, prefix):
    proxy.breaks = 2
    upload_folder("DIR", large, f"s3://models/{prefix}")
    assert proxy.breaks == 0
    assert contents(fetch_folder("model.source", f"s3://models/{prefix}")) == contents(large)


def test_a_folder_that_is_deleted_loses_its_manifest_first(s3, proxy, folder, prefix):
    upload_folder("DIR", folder, f"s3://models/{prefix}")
    upload_folder("DIR", folder, f"s3://models/{prefix}-other")
    proxy.asked.clear()
    delete_folder("DIR", f"s3://models/{prefix}")
    done = writes(proxy)
    assert done[:2] == [f"PUT {UNFINISHED}", f"DELETE {MANIFEST}"]
    assert done[-1] == f"DELETE {UNFINISHED}"
    assert names(s3, prefix) == set()
    assert names(s3, f"{prefix}-other") == {*contents(folder), MANIFEST}


def test_an_upload_of_nothing_or_to_no_bucket_is_one_line(s3, folder, tmp_path):
    with pytest.raises(RecipeError, match="has no files"):
        upload_folder("DIR", tmp_path / "no such folder", "s3://models/nothing")
    with pytest.raises(RecipeError, match=r"DIR 's3://nowhere/x' can't be written: there is no such bucket"):
        upload_folder("DIR", folder, "s3://nowhere/x")


def small(where: Path, step: int) -> Path:
    made = where / f"step-{step}"
    made.mkdir()
    (made / "weights.bin").write_text(f"weights of step {step}")
    return made


def test_folders_are_uploaded_in_order_and_the_latest_stay(s3, proxy, prefix, tmp_path):
    address, said = f"s3://models/{prefix}", []
    upload_folder("DIR", small(tmp_path, 1), f"{address}/export")
    uploads = Uploads(address, said.append, keep=2)
    for step in (9, 10, 11, 100):
        uploads.send(small(tmp_path, step), f"step-{step}")
    uploads.close(30)
    assert said == []
    assert complete_folders("DIR", address)[-2:] == ["step-11", "step-100"]
    assert sorted(complete_folders("DIR", address)) == ["export", "step-100", "step-11"], "an export is no checkpoint"
    assert {name.partition("/")[0] for name in names(s3, prefix)} == {"export", "step-100", "step-11"}
    sent = [line.split()[1] for line in writes(proxy) if line.endswith("weights.bin") and line.startswith("PUT")]
    assert sent == [f"{name}/weights.bin" for name in ("export", "step-9", "step-10", "step-11", "step-100")]
    fetched = fetch_folder("model.source", f"{address}/step-100")
    assert (fetched / "weights.bin").read_text() == "weights of step 100"


def test_a_deleted_folder_is_one_line_and_the_next_one_is_uploaded(s3, prefix, tmp_path):
    said: list[str] = []
    uploads = Uploads(f"s3://models/{prefix}", said.append, keep=2)
    uploads.send(tmp_path / "step-1", "step-1")
    uploads.send(small(tmp_path, 2), "step-2")
    uploads.close(30)
    (line,) = said
    assert line.startswith(f"checkpoint.upload s3://models/{prefix}/step-1: ")
    assert line.endswith("step-1 was deleted before it was uploaded; training continues")
    assert complete_folders("DIR", f"s3://models/{prefix}") == ["step-2"]


def test_part_of_a_folder_is_removed_after_the_next_upload(s3, proxy, large, prefix, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    said: list[str] = []
    proxy.breaks = 1
    uploads = Uploads(f"s3://models/{prefix}", said.append, keep=2)
    uploads.send(large, "step-1")
    uploads.send(small(tmp_path, 2), "step-2")
    uploads.close(30)
    (line,) = said
    assert f"s3://models/{prefix}/step-1' can't be written" in line
    assert "PUT step-1/deep/notes.txt" in writes(proxy)
    assert {name.partition("/")[0] for name in names(s3, prefix)} == {"step-2"}


def test_an_unreachable_server_is_one_line_for_each_folder(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    said: list[str] = []
    uploads = Uploads("s3://models/away", said.append, keep=2)
    for step in (1, 2):
        uploads.send(small(tmp_path, step), f"step-{step}")
    uploads.close(60)
    assert [re.search(r"step-\d", line)[0] for line in said] == ["step-1", "step-2"]
    for line in said:
        assert "can't be written: no answer" in line
        assert "testsecret123" not in line
        assert "\n" not in line


def test_uploads_that_miss_the_time_limit_are_named_and_given_up(s3, proxy, prefix, tmp_path):
    """Nothing goes through to the server meanwhile: neither sending nor the end waits for it."""
    said: list[str] = []
    with proxy.held():
        uploads = Uploads(f"s3://models/{prefix}", said.append, keep=2)
        for step in (1, 2):
            uploads.send(small(tmp_path, step), f"step-{step}")
        uploads.close(0.3)
        assert uploads._thread.is_alive()
        assert said == [
            f"checkpoint.upload s3://models/{prefix} lacks step-1, step-2 after 0.3 s; given up",
        ]
    uploads._thread.join(60)
    assert not uploads._thread.is_alive()
    assert "step-2/weights.bin" not in names(s3, prefix)


def test_a_server_that_falls_silent_in_the_middle_of_a_file_does_not_delay_the_end(s3, proxy, prefix, tmp_path):
    small(tmp_path, 1)
    program = (
        "import sys; from pathlib import Path; from mtp_ce.training.storage.uploads import Uploads\n"
        "uploads = Uploads(sys.argv[1], print, keep=1); uploads.send(Path(sys.argv[2]), 'step-1')\n"
        "input(); uploads.close(0.3)"
    )
    words = [sys.executable, "-c", program, f"s3://models/{prefix}", str(tmp_path / "step-1")]
    with (
        proxy.held(b"weights.bin"),
        subprocess.Popen(words, stdin=-1, stdout=-1, stderr=-1, text=True) as run,
    ):
        deadline = time.monotonic() + 60
        while not any("weights.bin" in line for line in writes(proxy)) and time.monotonic() < deadline:
            time.sleep(0.05)
        # Shorter than the client itself waits for an answer.
        said, errors = run.communicate("\n", timeout=READ_S - 5)
    assert (run.returncode, errors) == (0, "")
    assert said == f"checkpoint.upload s3://models/{prefix} lacks step-1 after 0.3 s; given up\n"
    assert f"PUT step-1/{UNFINISHED}" in writes(proxy)
