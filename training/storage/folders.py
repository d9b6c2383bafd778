"""Files and folders in S3: downloaded through a cache, and uploaded so that part of one is never read as the whole.

    s3://bucket/prefix/config.json              files of a folder
    s3://bucket/prefix/mtp_upload.unfinished    present while the folder is written or deleted
    s3://bucket/prefix/mtp_manifest.json        written last: {"files": {"config.json": {"size": 7, "sha256": ...}}}

A folder with a manifest consists of the files in it, whatever else lies beside them. A folder that other tools have
uploaded has neither of the two marks, and consists of all objects below the prefix.

In every function `key` is the recipe's key or the argument that holds the address, for messages, and `address` is
s3://bucket/prefix. All raise a RecipeError of one line if the address is malformed, or S3 refuses or does not answer.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from mtp_ce.training.storage.atomic import MANIFEST as LOCAL_MANIFEST
from mtp_ce.training.storage.cache import cache_folder, cached
from mtp_ce.training.storage.objects import StoredObject, download, forget_objects, look_up
from mtp_ce.training.storage.s3 import Location, ReadAgainError, StorageError, connected, error_code

MANIFEST = "mtp_manifest.json"
UNFINISHED = "mtp_upload.unfinished"

# How often a folder is read that changes meanwhile.
_READS = 3


def fetch_folder(key: str, address: str) -> Path:
    """Return a folder of the cache with every object below an address, downloaded where it is not there yet.

    Raises:
        RecipeError: also if there is no object or only part of an upload, or an object does not match the manifest.
    """
    with connected(key, address, "read") as (client, location):
        return _unchanged(lambda: _fetch(client, location, _contents(client, location)))


def fetch_file(key: str, address: str) -> Path:
    """Return a file of the cache with the object at an address, under its own name."""
    with connected(key, address, "read") as (client, location):
        name = PurePosixPath(location.key).name
        return _unchanged(lambda: _fetch(client, location, {name: look_up(client, location)})) / name


def check_address(key: str, address: str) -> None:
    """Check that an object, or any below the address, exists and may be read; download nothing."""
    with connected(key, address, "read") as (client, location):
        from botocore.exceptions import ClientError

        try:
            look_up(client, location)
        except ClientError as error:
            # S3 answers AccessDenied in place of NoSuchKey to those who may not list.
            if error_code(error) not in ("NoSuchKey", "AccessDenied"):
                raise
            files = [item for item in _page(client, location, 10) if not item["Key"].endswith("/")]
            if not files:
                raise StorageError("there is neither an object of this name nor any below it") from None
            look_up(client, Location(location.bucket, files[0]["Key"]))


def check_writable(key: str, address: str) -> None:
    """Check that the bucket of a destination exists and may be listed; write nothing."""
    with connected(key, address, "written") as (client, location):
        _page(client, location, 1)


def check_free(key: str, address: str) -> None:
    """Check that a folder can be uploaded to an address: nothing is there but part of an earlier upload."""
    with connected(key, address, "written") as (client, location):
        _refuse_taken(client, location)


def upload_folder(
    key: str,
    folder: Path,
    address: str,
    overwrite: bool = False,
    stop: threading.Event | None = None,
    parallel: bool = True,
) -> None:
    """Upload every file of a folder below an address, and at last the manifest that makes it complete.

    Args:
        key: see above.
        folder: on this machine; its files must not change meanwhile.
        address: see above.
        overwrite: replace a folder that exists; it is incomplete from the first byte on.
        stop: ends the upload early, without a manifest.
        parallel: upload the parts of a file at once, in threads that the interpreter waits for at exit.

    Raises:
        RecipeError: also if the folder is empty or vanishes, or the address is taken.
    """

    def check_stop(_: int) -> None:
        if stop and stop.is_set():
            raise StorageError("stopped before its end")

    with connected(key, address, "written") as (client, location):
        from boto3.s3.transfer import TransferConfig

        bucket, manifest, unfinished = location.bucket, f"{location.key}/{MANIFEST}", f"{location.key}/{UNFINISHED}"
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = [name for name in names if name not in (MANIFEST, UNFINISHED, LOCAL_MANIFEST)]
        if not names:
            raise StorageError(f"folder {folder} has no files")
        if not overwrite:
            _refuse_taken(client, location)
        client.put_object(Bucket=bucket, Key=unfinished, Body=b"")
        if overwrite:
            client.delete_object(Bucket=bucket, Key=manifest)
        files = {}
        for name in names:
            path, config = folder / name, TransferConfig(use_threads=parallel)
            files[name] = _manifest_entry(path)
            client.upload_file(str(path), bucket, f"{location.key}/{name}", Config=config, Callback=check_stop)
        _put_manifest(client, bucket, manifest, json.dumps({"files": files}, indent=1).encode())
        client.delete_object(Bucket=bucket, Key=unfinished)


def complete_folders(key: str, address: str) -> list[str]:
    """Return the names of the complete folders directly below an address, the oldest first."""
    folders = []
    with connected(key, address, "read") as (client, location):
        for item in _list(client, location):
            name, _, inside = item["Key"].removeprefix(f"{location.key}/").partition("/")
            if inside == MANIFEST:
                # Times are whole seconds on some servers; step-9 comes before step-10.
                folders.append((item["LastModified"], [int(number) for number in re.findall(r"\d+", name)], name))
    return [name for *_, name in sorted(folders)]


def delete_folder(key: str, address: str) -> None:
    """Delete every object below an address; the manifest is the first, so that what is left is incomplete."""
    with connected(key, address, "deleted") as (client, location):
        keys = {item["Key"] for item in _list(client, location)}
        if not keys:
            return
        first, last = f"{location.key}/{MANIFEST}", f"{location.key}/{UNFINISHED}"
        client.put_object(Bucket=location.bucket, Key=last, Body=b"")
        for one in [first, *sorted(keys - {first, last}), last]:
            client.delete_object(Bucket=location.bucket, Key=one)


def _unchanged(read: Callable[[], Path]) -> Path:
    """Read, and again from the beginning if something changed meanwhile."""
    for _ in range(_READS - 1):
        with suppress(ReadAgainError):
            return read()
    return read()


def _fetch(client: Any, location: Location, objects: dict[str, StoredObject]) -> Path:
    """A folder of the cache with these objects, by name."""
    for name, item in objects.items():
        inside = PurePosixPath(name)
        if ".." in inside.parts or inside.is_absolute():
            raise StorageError(f"it holds '{item.key}', which is outside of its folder")
    listing = "\n".join(f"{name} {item}" for name, item in sorted(objects.items()))
    content = f"{client.meta.endpoint_url}\n{location.bucket}\n{listing}"
    return cached(
        cache_folder() / "s3" / hashlib.sha256(content.encode()).hexdigest()[:32],
        lambda aside: download(client, location.bucket, objects, aside),
        forget=forget_objects,
    )


def _contents(client: Any, location: Location) -> dict[str, StoredObject]:
    """The objects of a folder, by their names in it."""
    listed = {
        item["Key"].removeprefix(f"{location.key}/"): StoredObject(item["Key"], item["ETag"], item["Size"])
        for item in _list(client, location)
        if PurePosixPath(item["Key"]).name != LOCAL_MANIFEST
    }
    if not listed:
        raise StorageError("it has no objects below it")
    if MANIFEST not in listed:
        if UNFINISHED in listed:
            raise StorageError("its upload is incomplete; upload it again")
        return listed
    manifest = (_fetch(client, location, {MANIFEST: listed[MANIFEST]}) / MANIFEST).read_bytes()
    try:
        files = {name: (int(file["size"]), str(file["sha256"])) for name, file in json.loads(manifest)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(f"its {MANIFEST} is damaged; upload it again") from None
    for name, (size, _) in files.items():
        if name not in listed:
            raise StorageError(f"'{name}' is in its manifest but not in the bucket; upload it again")
        if listed[name].size != size:
            raise StorageError(
                f"'{name}' has {listed[name].size:,} bytes and {size:,} in its manifest; upload it again"
            )
    return {name: replace(listed[name], sha256=sha256) for name, (_, sha256) in files.items()}


def _page(client: Any, location: Location, most: int) -> list[dict[str, Any]]:
    response = client.list_objects_v2(Bucket=location.bucket, Prefix=f"{location.key}/", MaxKeys=most)
    return list(response.get("Contents", []))


def _list(client: Any, location: Location) -> list[dict[str, Any]]:
    """Every object below an address, except those that stand for an empty folder."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=location.bucket, Prefix=f"{location.key}/")
    return [item for page in pages for item in page.get("Contents", []) if not item["Key"].endswith("/")]


def _refuse_taken(client: Any, location: Location) -> None:
    names = {item["Key"].removeprefix(f"{location.key}/") for item in _list(client, location)}
    if MANIFEST in names or (names and UNFINISHED not in names):
        raise StorageError("there are objects at this address already; name another one")


def _put_manifest(client: Any, bucket: str, key: str, manifest: bytes) -> None:
    """Put the manifest; of two uploads to one address the second to end is refused, if the server knows conditions."""
    from botocore.exceptions import ClientError

    try:
        client.put_object(Bucket=bucket, Key=key, Body=manifest, IfNoneMatch="*")
    except ClientError as error:
        if error_code(error) not in ("PreconditionFailed", "ConditionalRequestConflict"):
            raise
        # A retry after a lost response is refused because of the first attempt.
        if client.get_object(Bucket=bucket, Key=key)["Body"].read() != manifest:
            raise StorageError("another upload to this address has ended meanwhile; give each its own") from None


def _manifest_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
