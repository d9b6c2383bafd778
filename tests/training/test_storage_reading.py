"""What is read from S3: once, from where it was cut off, whole or not at all; against a server, through a proxy."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from pathlib import Path

import boto3
import pytest

from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage import objects
from mtp_ce.training.storage.folders import check_address, check_writable, fetch_file, fetch_folder
from mtp_ce.training.storage.s3 import READ_S, connected

BODY = os.urandom(3 << 20)


def header(head: str, name: str) -> str | None:
    found = re.search(rf"(?im)^{name}: (.*?)\r?$", head)
    return found and found[1]


def test_a_folder_is_loaded_once_and_afterwards_what_has_changed(s3, proxy, prefix):
    for name in ("config.json", "deep/er/model.bin", "empty"):
        s3.put_object(Bucket="models", Key=f"{prefix}/{name}", Body=b"" if name == "empty" else name.encode())
    s3.put_object(Bucket="models", Key=f"{prefix}-other/config.json", Body=b"of another folder")
    folder = fetch_folder("model.source", f"s3://models/{prefix}")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == {"config.json": b"config.json", "deep/er/model.bin": b"deep/er/model.bin", "empty": b""}
    assert len(proxy.gets()) == 3
    assert fetch_folder("model.source", f"s3://models/{prefix}/") == folder
    assert len(proxy.gets()) == 3
    s3.put_object(Bucket="models", Key=f"{prefix}/config.json", Body=b"new")
    changed = fetch_folder("model.source", f"s3://models/{prefix}")
    assert (changed / "config.json").read_bytes() == b"new"
    assert len(proxy.gets()) == 4
    assert (folder / "config.json").read_bytes() == b"config.json", "who holds the old folder reads on in it"


def test_a_file_keeps_its_name_and_is_loaded_once(s3, proxy, prefix):
    s3.put_object(Bucket="models", Key=f"{prefix}/some.gguf", Body=BODY)
    file = fetch_file("model.source", f"s3://models/{prefix}/some.gguf")
    assert (file.name, file.read_bytes()) == ("some.gguf", BODY)
    served = proxy.served
    assert fetch_file("model.source", f"s3://models/{prefix}/some.gguf") == file
    assert header(proxy.gets()[-1], "Range") == "bytes=0-0", "its ETag is asked for"
    assert proxy.served - served < 10_000


def test_an_empty_object_is_an_empty_file(s3, prefix):
    s3.put_object(Bucket="models", Key=f"{prefix}/empty.txt", Body=b"")
    check_address("data.corpus", f"s3://models/{prefix}/empty.txt")
    assert fetch_file("data.corpus", f"s3://models/{prefix}/empty.txt").read_bytes() == b""


def test_a_body_that_is_cut_off_goes_on_where_it_ended(s3, proxy, prefix, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    etag = s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=BODY)["ETag"]
    proxy.cuts = [1 << 20, 1 << 20]
    folder = fetch_folder("model.source", f"s3://models/{prefix}")
    assert (folder / "model.bin").read_bytes() == BODY
    whole, *rest = proxy.gets()
    assert header(whole, "Range") is None
    begins = [int(re.fullmatch(r"bytes=(\d+)-", header(head, "Range"))[1]) for head in rest]
    assert len(begins) == 2
    assert 0 < begins[0] < begins[1] < len(BODY)
    assert {header(head, "If-Match") for head in proxy.gets()} == {etag}
    # Heads of answers and the listing; no byte of the body twice but what was in the last piece of a cut one.
    assert proxy.served < len(BODY) + (1 << 20)


def test_another_process_goes_on_where_the_last_one_failed(s3, proxy, prefix, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(objects, "_FIRST_PAUSE_S", 0.001)
    s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=BODY)
    proxy.cuts = [2 << 20, *[0] * 20]
    with pytest.raises(RecipeError, match=rf"model\.source 's3://models/{prefix}' can't be read: no answer") as raised:
        fetch_folder("model.source", f"s3://models/{prefix}")
    assert "\n" not in str(raised.value)
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("model.bin"))
    proxy.cuts = []
    before = len(proxy.gets())
    folder = fetch_folder("model.source", f"s3://models/{prefix}")
    assert (folder / "model.bin").read_bytes() == BODY
    (last,) = proxy.gets()[before:]
    assert int(re.fullmatch(r"bytes=(\d+)-", header(last, "Range"))[1]) > 1 << 20


@pytest.mark.parametrize("fetch", [fetch_folder, fetch_file])
def test_an_object_that_changes_between_two_ranges_is_never_half_of_each(s3, proxy, prefix, fetch):
    new = BODY[::-1]
    s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=BODY)
    # A file is first looked up, which is a request for an object too.
    proxy.cuts = [1 << 20] if fetch is fetch_folder else [None, 1 << 20]
    proxy.between = lambda: s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=new)
    address = f"s3://models/{prefix}" + ("" if fetch is fetch_folder else "/model.bin")
    found = fetch("model.source", address)
    assert (found / "model.bin" if found.is_dir() else found).read_bytes() == new
    assert any(header(head, "Range") for head in proxy.gets())


def test_an_object_that_never_stays_the_same_is_one_line(s3, proxy, prefix):
    s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=BODY)
    proxy.cuts = [1 << 20, None] * 3
    proxy.between = lambda: s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=os.urandom(3 << 20))
    with pytest.raises(RecipeError, match=rf"'{prefix}/model.bin' changes while it is read; try again"):
        fetch_folder("model.source", f"s3://models/{prefix}")


def test_what_two_processes_load_at_once_is_loaded_once(s3, proxy, prefix):
    s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=BODY)
    found: list[Path] = []
    load = lambda: found.append(fetch_folder("model.source", f"s3://models/{prefix}"))  # noqa: E731
    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert len(proxy.gets()) == 1


@pytest.mark.parametrize("algorithm", ["CRC32", "SHA1", "SHA256"])
def test_a_body_in_pieces_is_compared_with_its_checksum(conditions, prefix, algorithm, monkeypatch):
    """A beginning that the disk has damaged: nothing else would notice, and the next attempt is free of it."""
    client = boto3.session.Session().client("s3")
    client.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=BODY, ChecksumAlgorithm=algorithm)
    address = f"s3://models/{prefix}"
    monkeypatch.setattr(objects, "_FRUITLESS", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    conditions.cuts = [1 << 20, 0]
    with pytest.raises(RecipeError, match="no answer"):
        fetch_folder("model.source", address)
    (part,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.part")
    with part.open("r+b") as file:
        file.write(b"damaged")
    with pytest.raises(RecipeError, match=rf"'{prefix}/model.bin' does not fit its {algorithm} checksum; try again"):
        fetch_folder("model.source", address)
    conditions.cuts = [1 << 20]
    assert (fetch_folder("model.source", address) / "model.bin").read_bytes() == BODY
    assert header(conditions.gets()[-1], "Range")


def test_a_body_that_is_damaged_on_its_way_is_loaded_again(conditions, prefix, monkeypatch):
    boto3.session.Session().client("s3").put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=BODY)
    conditions.damage = 1
    assert (fetch_folder("model.source", f"s3://models/{prefix}") / "model.bin").read_bytes() == BODY
    assert [header(head, "Range") for head in conditions.gets()] == [None, None]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://models/nothing", "no objects below it|no such object|nothing is there"),
        ("s3://nowhere/model", r"there is no such bucket \(NoSuchBucket\)"),
        ("s3://Not_a_bucket/model", "Invalid bucket name|no name that a bucket can have"),
        ("s3://models", "expected s3://bucket/prefix"),
        ("s3:///model", "expected s3://bucket/prefix"),
        ("models/model", "expected s3://bucket/prefix"),
    ],
)
def test_what_is_not_there_is_one_line(s3, address, words):
    for read in (fetch_folder, fetch_file, check_address):
        with pytest.raises(RecipeError, match=words) as raised:
            read("data.tokenizer", address)
        begin = f"data.tokenizer is '{address}'" if "expected" in words else f"data.tokenizer '{address}' can't be read"
        assert str(raised.value).startswith(begin)
        assert "\n" not in str(raised.value)


SETTINGS = {
    "another secret key": (
        {"AWS_SECRET_ACCESS_KEY": "wrong-secret"},
        r"the secret key does not belong to the access key \(SignatureDoesNotMatch\)",
    ),
    "an unknown access key": (
        {"AWS_ACCESS_KEY_ID": "unknown-key"},
        r"does not know this access key \(InvalidAccessKeyId\)",
    ),
    "no credentials": ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no whole credentials; set AWS_ACC"),
    "half of them": ({"AWS_SECRET_ACCESS_KEY": None}, "no whole credentials; set AWS_ACC"),
    "no such profile": ({"AWS_PROFILE": "nobody"}, r"profile \(nobody\) could not be found"),
    "nobody listens": ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "no answer; look at AWS_ENDPOINT_URL_S3"),
    "no endpoint": ({"AWS_ENDPOINT_URL_S3": "somewhere"}, "Invalid endpoint"),
    "a password in it": (
        {"AWS_ENDPOINT_URL_S3": "http://me:hidden@127.0.0.1:9"},
        r"http://\*\*\*@127\.0\.0\.1:9/models",
    ),
    "no file of settings": ({"AWS_CONFIG_FILE": "/nowhere", "AWS_PROFILE": "nobody"}, "nobody"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_wrong_are_one_line_at_once_without_a_credential(s3, case, monkeypatch):
    settings, words = SETTINGS[case]
    for name, value in settings.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    began = time.monotonic()
    look = check_writable if case in ("another secret key", "nobody listens") else check_address
    with pytest.raises(RecipeError, match=words) as raised:
        look("model.source", "s3://models/some/model")
    said = str(raised.value)
    assert said.startswith("model.source 's3://models/some/model' can't be ")
    assert "\n" not in said
    for secret in ("testkey", "testsecret123", "unknown-key", "wrong-secret", "hidden"):
        assert secret not in said
    assert time.monotonic() - began < READ_S


def test_a_machine_that_does_not_answer_is_given_up_in_seconds(s3, monkeypatch):
    """It takes connections and says nothing: the first attempt ends after READ_S, and so on."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("mtp_ce.training.storage.s3.READ_S", 0.2)
        began = time.monotonic()
        with pytest.raises(RecipeError, match="no answer; look at AWS_ENDPOINT_URL_S3 and the network"):
            check_address("model.source", "s3://models/model")
        assert time.monotonic() - began < READ_S


@pytest.mark.parametrize(
    "text",
    [
        "signed with testsecret123 as testkey",
        "http://models.host/key?X-Amz-Credential=AKIA&X-Amz-Signature=hidden&versionId=3",
        "https://host/key?AWSAccessKeyId=hidden&Signature=hidden",
        "proxy http://me:hidden@host:3128 refuses",
    ],
)
def test_no_credential_comes_through_whatever_the_error_says(s3, text, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hidden")
    with pytest.raises(RecipeError) as raised, connected("model.source", "s3://models/model", "read"):
        raise OSError(text)
    assert "***" in str(raised.value)
    for secret in ("hidden", "testsecret123", "testkey", "AKIA"):
        assert secret not in str(raised.value)


def test_credentials_of_a_profile_are_not_shown_either(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    keys = "[here]\naws_access_key_id = profile-key\naws_secret_access_key = profile-secret\n"
    (tmp_path / "credentials").write_text(keys)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "here")
    with pytest.raises(RecipeError) as raised, connected("model.source", "s3://models/model", "read"):
        raise OSError("profile-key and profile-secret")
    assert str(raised.value).endswith("can't be read: *** and ***")


def test_credentials_in_an_address_are_refused_and_not_repeated(s3):
    with pytest.raises(
        RecipeError, match=r"model\.source has credentials in its address; set AWS_ACCESS_KEY_ID"
    ) as raised:
        fetch_folder("model.source", "s3://testkey:testsecret123@models/model")
    assert "testsecret123" not in str(raised.value)


def test_a_look_loads_nothing(s3, proxy, prefix):
    s3.put_object(Bucket="models", Key=f"{prefix}/model.bin", Body=os.urandom(8 << 20))
    check_address("model.source", f"s3://models/{prefix}")
    check_address("model.source", f"s3://models/{prefix}/model.bin")
    check_writable("output", f"s3://models/{prefix}/new")
    assert len(proxy.asked) == 5
    assert {head.partition(" ")[0] for head in proxy.asked} == {"GET"}
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists()


def test_a_key_that_leads_out_of_its_folder_is_refused(conditions, prefix):
    client = boto3.session.Session().client("s3")
    client.put_object(Bucket="models", Key=f"{prefix}/../../out", Body=b"out")
    with pytest.raises(RecipeError, match="which leads out of its folder"):
        fetch_folder("model.source", f"s3://models/{prefix}")
