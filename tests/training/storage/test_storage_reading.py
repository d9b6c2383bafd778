"""Reads from a server behind a proxy: an object is downloaded once, is complete or absent, and is one version."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import pytest

from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.folders import check_address, check_writable, fetch_file, fetch_folder
from mtp_ce.training.storage.s3 import READ_S, connected

BODY = os.urandom(3 << 20)
# Two parts for s3transfer, whose parts are 8 MiB.
LARGE = os.urandom(10 << 20)


def header(head: str, name: str) -> str | None:
    match = re.search(rf"(?im)^{name}: (.*?)\r?$", head)
    return match and match[1]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name, but the list of files that every entry of the cache has."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".mtp_files.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def strays() -> list[Path]:
    """What is in the cache beside complete objects and folders, and locks."""
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "mtp_ce" / "s3"
    complete = re.compile(r"objects|[0-9a-f]{32}(\.lock)?")
    return [path for path in (*cache.glob("*"), *cache.glob("objects/*")) if not complete.fullmatch(path.name)]


def test_a_folder_is_downloaded_once_and_afterwards_what_has_changed(s3, proxy, prefix):
    for name in ("config.json", "deep/er/model.bin", "empty"):
        s3.put_object(Bucket="models", Key=f"{prefix}/{name}", Body=b"" if name == "empty" else name.encode())
    s3.put_object(Bucket="models", Key=f"{prefix}-other/config.json", Body=b"of another folder")
    folder = fetch_folder("model.source", f"s3://models/{prefix}")
    assert contents(folder) == {"config.json": b"config.json", "deep/er/model.bin": b"deep/er/model.bin", "empty": b""}
    assert len(proxy.gets()) == 3
    assert fetch_folder("model.source", f"s3://models/{prefix}/") == folder
    assert len(proxy.gets()) == 3
    s3.put_object(Bucket="models", Key=f"{prefix}/config.json", Body=b"new")
    changed = fetch_folder("model.source", f"s3://models/{prefix}")
    assert (changed / "config.json").read_bytes() == b"new"
    assert len(proxy.gets()) == 4
    assert (folder / "config.json").read_bytes() == b"config.json", (
        "a process that reads the old folder is not disturbed"
    )


def test_a_file_keeps_its_name_and_is_downloaded_once(s3, proxy, prefix):
    for name, body in (("some.gguf", BODY), ("empty.txt", b"")):
        s3.put_object(Bucket="models", Key=f"{prefix}/{name}", Body=body)
        check_address("model.source", f"s3://models/{prefix}/{name}")
        file = fetch_file("model.source", f"s3://models/{prefix}/{name}")
        assert (file.name, file.read_bytes()) == (name, body)
    served = proxy.served
    fetch_file("model.source", f"s3://models/{prefix}/some.gguf")
    assert header(proxy.gets()[-1], "Range") == "bytes=0-0", "only its ETag and size are requested"
    assert proxy.served - served < 10_000


def test_a_broken_connection_costs_its_part_alone(s3, proxy, prefix, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    etag = s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=LARGE)["ETag"]
    proxy.cuts = [1 << 20]
    folder = fetch_folder("model.source", f"s3://models/{prefix}")
    assert (folder / "model.bin").read_bytes() == LARGE
    assert len(proxy.gets()) == 3
    assert {header(head, "Range") for head in proxy.gets()} == {"bytes=0-8388607", "bytes=8388608-"}
    assert {header(head, "If-Match") for head in proxy.gets()} == {etag}


def test_a_failed_download_costs_the_objects_that_were_not_complete(s3, proxy, prefix, monkeypatch):
    """The server is silent about one object of two; the next process finds the other one in the cache."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name in ("config.json", "model.bin"):
        s3.put_object(Bucket="models", Key=f"{prefix}/{name}", Body=name.encode())
    address = f"s3://models/{prefix}"
    with monkeypatch.context() as patch, proxy.held(b"model.bin"):
        patch.setattr("mtp_ce.training.storage.s3.READ_S", 0.5)
        with pytest.raises(RecipeError, match=rf"model\.source '{address}' can't be read: no answer") as raised:
            fetch_folder("model.source", address)
    assert "\n" not in str(raised.value)
    assert strays() == []
    proxy.asked.clear()
    assert contents(fetch_folder("model.source", address)) == {"config.json": b"config.json", "model.bin": b"model.bin"}
    assert len(proxy.gets()) == len(proxy.gets("model.bin")) == 1


# A test runner in the background may have Ctrl-C ignored, and children inherit that.
DOWNLOADING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from mtp_ce.training.storage import s3
from mtp_ce.training.storage.folders import fetch_folder
s3.READ_S = 3
try:
    fetch_folder("model.source", sys.argv[1])
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_ended_leaves_no_partial_files(s3, proxy, prefix, number):
    """Its server has fallen silent; Ctrl-C does not wait for retries, and the next process cleans up after a kill."""
    s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=LARGE)
    s3.put_object(Bucket="texts", Key=f"{prefix}/text", Body=b"text")
    address = f"s3://models/{prefix}"
    with proxy.held(b"model.bin"):
        run = subprocess.Popen([sys.executable, "-c", DOWNLOADING, address], stdout=-1, stderr=-1, text=True)
        deadline = time.monotonic() + 60
        while not proxy.gets("model.bin") and time.monotonic() < deadline:
            time.sleep(0.05)
        began = time.monotonic()
        run.send_signal(number)
        said, errors = run.communicate(timeout=60)
        taken = time.monotonic() - began
    if number == signal.SIGINT:
        assert (run.returncode, said, errors) == (0, "interrupted\n", "")
        assert taken < 10, "one read of READ_S, not 3 attempts of 5 retries"
    else:
        assert strays() != []
        fetch_folder("data.corpus", f"s3://texts/{prefix}")
    assert strays() == []


@pytest.mark.parametrize("fetch", [fetch_folder, fetch_file])
def test_an_object_that_changes_between_two_parts_is_never_half_of_each(s3, proxy, prefix, fetch):
    new = LARGE[::-1]
    s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=LARGE)
    # A file is first looked up, which is a request for an object too.
    proxy.cuts = [1 << 20] if fetch is fetch_folder else [None, 1 << 20]
    proxy.between = lambda: s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=new)
    path = fetch("model.source", f"s3://models/{prefix}" + ("" if fetch is fetch_folder else "/model.bin"))
    assert (path / "model.bin" if path.is_dir() else path).read_bytes() == new


def test_an_object_that_never_stays_the_same_is_one_line(s3, proxy, prefix):
    s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=BODY)
    proxy.cuts = [1 << 20, None] * 3
    proxy.between = lambda: s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=os.urandom(3 << 20))
    with pytest.raises(RecipeError, match=rf"'{prefix}/model.bin' changes while it is read; try again"):
        fetch_folder("model.source", f"s3://models/{prefix}")


def test_what_several_processes_download_at_once_is_downloaded_once(s3, proxy, prefix):
    s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=BODY)
    folders: list[Path] = []
    load = lambda: folders.append(fetch_folder("model.source", f"s3://models/{prefix}"))  # noqa: E731
    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3
    assert len(set(folders)) == 1
    assert len(proxy.gets()) == 1


@pytest.mark.parametrize(("size", "algorithm"), [(3 << 20, "CRC32"), (10 << 20, "CRC32"), (10 << 20, "SHA256")])
def test_a_body_that_is_damaged_on_its_way_is_read_again(conditions, prefix, size, algorithm):
    """In one request botocore compares the checksum, in parts it is compared with that of a HEAD."""
    client = boto3.session.Session().client("s3")
    client.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=LARGE[:size], ChecksumAlgorithm=algorithm)
    address = f"s3://models/{prefix}"
    conditions.damage = 1000
    with pytest.raises(RecipeError, match=rf"'{prefix}/model.bin' does not match its checksum; try again"):
        fetch_folder("model.source", address)
    conditions.damage = 1
    assert (fetch_folder("model.source", address) / "model.bin").read_bytes() == LARGE[:size]
    assert conditions.damage == 0


MISSING = {
    "s3://models/nothing": "no objects below it|no such object|neither an object",
    "s3://nowhere/model": r"there is no such bucket \(NoSuchBucket\)",
    "s3://Not_a_bucket/model": "Invalid bucket name|not a valid bucket name",
    "s3://models": "expected s3://bucket/prefix",
    "s3:///model": "expected s3://bucket/prefix",
    "models/model": "expected s3://bucket/prefix",
    "s3://testkey:testsecret123@models/model": "credentials or a query in its address; set AWS_ACCESS_KEY_ID",
}


@pytest.mark.parametrize("read", [fetch_folder, fetch_file, check_address])
def test_a_wrong_address_is_one_line(s3, read):
    for address, words in MISSING.items():
        with pytest.raises(RecipeError, match=words) as raised:
            read("data.tokenizer", address)
        message = str(raised.value)
        assert message.startswith(f"data.tokenizer {'is' if 'expected' in words else ''}".rstrip())
        assert (address in message) == ("@" not in address)
        assert "\n" not in message


SETTINGS = {
    "another secret key": (
        {"AWS_SECRET_ACCESS_KEY": "wrong-secret"},
        r"the secret key does not belong to the access key \(SignatureDoesNotMatch\)",
    ),
    "an unknown access key": (
        {"AWS_ACCESS_KEY_ID": "unknown-key"},
        r"does not know this access key \(InvalidAccessKeyId\)",
    ),
    "no credentials": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
        "credentials are missing or incomplete; set AWS_ACC",
    ),
    "half of them": ({"AWS_SECRET_ACCESS_KEY": None}, "credentials are missing or incomplete; set AWS_ACC"),
    "no such profile": (
        {"AWS_CONFIG_FILE": "/nowhere", "AWS_PROFILE": "nobody"},
        r"profile \(nobody\) could not be found",
    ),
    "nobody listens": ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "no answer; check AWS_ENDPOINT_URL_S3"),
    "no endpoint": ({"AWS_ENDPOINT_URL_S3": "somewhere"}, "Invalid endpoint"),
    "a password in it": (
        {"AWS_ENDPOINT_URL_S3": "http://me:hidden@127.0.0.1:9"},
        r"http://\*\*\*@127\.0\.0\.1:9/models",
    ),
}


def test_wrong_settings_are_one_line_at_once_without_a_credential(s3, monkeypatch):
    for case, (settings, words) in SETTINGS.items():
        check = check_writable if case in ("another secret key", "nobody listens") else check_address
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.delenv(name) if value is None else patch.setenv(name, value)
            began = time.monotonic()
            with pytest.raises(RecipeError, match=words) as raised:
                check("model.source", "s3://models/some/model")
        message = str(raised.value)
        assert message.startswith("model.source 's3://models/some/model' can't be "), case
        assert "\n" not in message
        for secret in ("testkey", "testsecret123", "unknown-key", "wrong-secret", "hidden"):
            assert secret not in message
        assert time.monotonic() - began < READ_S


def test_a_machine_that_does_not_answer_is_given_up_in_seconds(s3, monkeypatch):
    """It accepts connections and never answers: the first attempt ends after READ_S, and so on."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("mtp_ce.training.storage.s3.READ_S", 0.2)
        began = time.monotonic()
        with pytest.raises(RecipeError, match="no answer; check AWS_ENDPOINT_URL_S3 and the network"):
            check_address("model.source", "s3://models/model")
        assert time.monotonic() - began < READ_S


def test_no_message_shows_a_credential_whatever_the_error_says(s3, monkeypatch, tmp_path):
    """Those of the environment, in the forms that URLs have, and those of a profile."""
    texts = (
        "signed with testsecret123 as testkey",
        "http://models.host/key?X-Amz-Credential=AKIA&X-Amz-Signature=hidden&versionId=3",
        "https://host/key?AWSAccessKeyId=hidden&Signature=hidden",
        "proxy http://me:hidden@host:3128 refuses",
        "profile-key and profile-secret",
    )
    for text in texts:
        with monkeypatch.context() as patch:
            patch.setenv("AWS_SESSION_TOKEN", "hidden")
            if text.startswith("profile"):
                for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
                    patch.delenv(name)
                keys = "[here]\naws_access_key_id = profile-key\naws_secret_access_key = profile-secret\n"
                (tmp_path / "credentials").write_text(keys)
                patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
                patch.setenv("AWS_PROFILE", "here")
            with pytest.raises(RecipeError) as raised, connected("model.source", "s3://models/model", "read"):
                raise OSError(text)
        assert "***" in str(raised.value)
        for secret in ("hidden", "testsecret123", "testkey", "AKIA", "profile-key", "profile-secret"):
            assert secret not in str(raised.value)


def test_a_check_downloads_nothing(s3, proxy, prefix):
    s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=os.urandom(8 << 20))
    check_address("model.source", f"s3://models/{prefix}")
    check_address("model.source", f"s3://models/{prefix}/model.bin")
    check_writable("output", f"s3://models/{prefix}/new")
    assert len(proxy.asked) == 5
    assert {head.partition(" ")[0] for head in proxy.asked} == {"GET"}
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists()


def test_a_key_outside_of_its_folder_is_refused(conditions, prefix):
    client = boto3.session.Session().client("s3")
    client.put_object(Bucket="models", Key=f"{prefix}/../../out", Body=b"out")
    with pytest.raises(RecipeError, match="which is outside of its folder"):
        fetch_folder("model.source", f"s3://models/{prefix}")
