"""Files and folders in S3: read through a cache, checked, and written so that half of a folder is never taken for one.

    s3://bucket/prefix/config.json              files of a folder
    s3://bucket/prefix/mtp_upload.unfinished    while it is written or deleted
    s3://bucket/prefix/mtp_manifest.json        written last: {"files": {"config.json": {"size": 7, "sha256": ...}}}

A folder with a manifest is what its manifest says, whatever else lies beside it. One that others have put there has
neither of the two, and is what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from mtp_ce.training.storage.atomic import whole_folder
from mtp_ce.training.storage.cache import cache_folder
from mtp_ce.training.storage.objects import Stored, fetch_object, look_up
from mtp_ce.training.storage.s3 import Address, ChangedError, StorageError, connected, error_code, parse_address

MANIFEST = "mtp_manifest.json"
UNFINISHED = "mtp_upload.unfinished"

# Objects that are loaded at once, one stream each.
_STREAMS = 8

# How often a folder that changes while it is read is read again.
_READINGS = 3


def fetch_folder(key: str, address: str) -> Path:
    """Give a folder of the cache with every object below an address, loaded where it is not there yet.

    Args:
        key: the recipe's key that holds the address, for messages.
        address: s3://bucket/prefix.

    Raises:
        RecipeError: the address is not one, nothing or half an upload is there, an object does not fit the manifest,
            or S3 refuses or does not answer.
    """
    place = parse_address(key, address)
    with connected(key, address, "read") as client:
        return _unchanged(lambda: _fetch(client, place, _contents(client, place)))


def fetch_file(key: str, address: str) -> Path:
    """Give a file of the cache with one object, under its own name.

    Args:
        key: the recipe's key that holds the address, for messages.
        address: s3://bucket/path/name.

    Raises:
        RecipeError: the address is not one, nothing is there, or S3 refuses or does not answer.
    """
    place = parse_address(key, address)
    name = PurePosixPath(place.key).name
    with connected(key, address, "read") as client:
        return _unchanged(lambda: _fetch(client, place, {name: look_up(client, place)})) / name


def check_address(key: str, address: str) -> None:
    """Look whether an object, or any below an address, is there and may be read; loads nothing.

    Raises:
        RecipeError: the address is not one, nothing is there, or S3 refuses or does not answer.
    """
    place = parse_address(key, address)
    with connected(key, address, "read") as client:
        from botocore.exceptions import ClientError

        try:
            look_up(client, place)
        except ClientError as error:
            # Who may not list is told so instead of being told that there is no such object.
            if error_code(error) not in ("NoSuchKey", "AccessDenied"):
                raise
            found = [item for item in _page(client, place, 10) if not item["Key"].endswith("/")]
            if not found:
                raise StorageError("nothing is there, neither an object nor any below it") from None
            look_up(client, Address(place.bucket, found[0]["Key"]))


def check_writable(key: str, address: str) -> None:
    """Look whether the bucket of a destination is there and may be listed; writes nothing.

    Raises:
        RecipeError: the address is not one, there is no such bucket, or S3 refuses or does not answer.
    """
    place = parse_address(key, address)
    with connected(key, address, "written") as client:
        _page(client, place, 1)


def check_free(key: str, address: str) -> None:
    """Look whether a folder can be uploaded to an address: nothing is there but half of an earlier upload.

    Raises:
        RecipeError: something is there, or as `check_writable`.
    """
    place = parse_address(key, address)
    with connected(key, address, "written") as client:
        _refuse_taken(client, place)


def upload_folder(
    key: str,
    folder: Path,
    address: str,
    overwrite: bool = False,
    stop: threading.Event | None = None,
    parallel: bool = True,
) -> None:
    """Write every file of a folder below an address, and at last the manifest that makes it whole.

    Args:
        key: the recipe's key or the argument that holds the address, for messages.
        folder: on this machine; its files stay as they are meanwhile.
        address: s3://bucket/prefix.
        overwrite: replaces a folder that is there; it counts as not there from the first byte on.
        stop: ends the upload early; what is there then has no manifest.
        parallel: sends the parts of a file at once, in threads that a process waits for at its end.

    Raises:
        RecipeError: the folder is empty or vanishes, another one is there, or S3 refuses or does not answer.
    """
    place = parse_address(key, address)
    with connected(key, address, "written") as client:
        # Only where it is known that boto3 is there.
        from boto3.s3.transfer import TransferConfig
        from botocore.exceptions import ClientError

        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = [name for name in names if name not in (MANIFEST, UNFINISHED)]
        if not names:
            raise StorageError(f"folder {folder} has no files")
        if not overwrite:
            _refuse_taken(client, place)
        _put(client, place, UNFINISHED, b"")
        if overwrite:
            client.delete_object(Bucket=place.bucket, Key=f"{place.key}/{MANIFEST}")
        files: dict[str, dict[str, Any]] = {}
        for name in names:
            files[name] = _describe(folder / name)
            client.upload_file(
                str(folder / name),
                place.bucket,
                f"{place.key}/{name}",
                Config=TransferConfig(use_threads=parallel),
                Callback=_stopping(stop or threading.Event()),
            )
        manifest = json.dumps({"files": files}, indent=1).encode()
        try:
            # Of two uploads to one address the second to end is refused, where the server knows conditions.
            _put(client, place, MANIFEST, manifest, IfNoneMatch="*")
        except ClientError as error:
            if error_code(error) not in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise
            # One whose answer is lost is put again, and refused because of itself.
            there = client.get_object(Bucket=place.bucket, Key=f"{place.key}/{MANIFEST}")["Body"].read()
            if there != manifest:
                raise StorageError("another upload to this address has ended meanwhile; give each its own") from None
        client.delete_object(Bucket=place.bucket, Key=f"{place.key}/{UNFINISHED}")


def complete_folders(key: str, address: str) -> list[str]:
    """Name the folders directly below an address whose upload is complete, the one completed longest ago first.

    Raises:
        RecipeError: the address is not one, or S3 refuses or does not answer.
    """
    place = parse_address(key, address)
    found: list[tuple[datetime, list[int], str]] = []
    with connected(key, address, "read") as client:
        for item in _list(client, place):
            name, _, inside = item["Key"].removeprefix(f"{place.key}/").partition("/")
            if inside == MANIFEST:
                # Times are whole seconds on some servers; step-9 comes before step-10.
                found.append((item["LastModified"], [int(number) for number in re.findall(r"\d+", name)], name))
    return [name for *_, name in sorted(found)]


def delete_folder(key: str, address: str) -> None:
    """Delete every object below an address, the manifest first: it counts as not there from the first one on.

    Raises:
        RecipeError: the address is not one, or S3 refuses or does not answer.
    """
    place = parse_address(key, address)
    with connected(key, address, "deleted") as client:
        keys = [item["Key"] for item in _list(client, place)]
        if not keys:
            return
        _put(client, place, UNFINISHED, b"")
        first, last = f"{place.key}/{MANIFEST}", f"{place.key}/{UNFINISHED}"
        for one in [first, *sorted({*keys} - {first, last}), last]:
            client.delete_object(Bucket=place.bucket, Key=one)


def _unchanged(read: Callable[[], Path]) -> Path:
    """Read, and once more from the beginning where something changed meanwhile."""
    for _ in range(_READINGS - 1):
        with suppress(ChangedError):
            return read()
    return read()


def _page(client: Any, place: Address, most: int) -> list[dict[str, Any]]:
    answer = client.list_objects_v2(Bucket=place.bucket, Prefix=f"{place.key}/", MaxKeys=most)
    return list(answer.get("Contents", []))


def _list(client: Any, place: Address) -> list[dict[str, Any]]:
    """Every object below an address, without those that stand for an empty folder."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=place.bucket, Prefix=f"{place.key}/")
    return [item for page in pages for item in page.get("Contents", []) if not item["Key"].endswith("/")]


def _contents(client: Any, place: Address) -> dict[str, Stored]:
    """The objects of a folder by their names in it."""
    listed = {
        item["Key"].removeprefix(f"{place.key}/"): Stored(item["Key"], item["ETag"], item["Size"])
        for item in _list(client, place)
    }
    if not listed:
        raise StorageError("it has no objects below it")
    if MANIFEST not in listed:
        if UNFINISHED in listed:
            raise StorageError("its upload has not come to its end; upload it again")
        return listed
    written = fetch_object(client, place.bucket, listed[MANIFEST], threading.Event()).read_text(encoding="utf-8")
    try:
        files = {name: (int(file["size"]), str(file["sha256"])) for name, file in json.loads(written)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(f"its {MANIFEST} is damaged; upload it again") from None
    whole: dict[str, Stored] = {}
    for name, (size, sha256) in files.items():
        if name not in listed:
            raise StorageError(f"'{name}' is not there, but in its manifest; upload it again")
        if listed[name].size != size:
            raise StorageError(
                f"'{name}' has {listed[name].size:,} bytes and {size:,} in its manifest; upload it again"
            )
        whole[name] = replace(listed[name], sha256=sha256)
    return whole


def _fetch(client: Any, place: Address, items: dict[str, Stored]) -> Path:
    """A folder of the cache with these objects, by name."""
    for name in items:
        inside = PurePosixPath(name)
        if ".." in inside.parts or inside.is_absolute():
            raise StorageError(f"it holds '{items[name].key}', which leads out of its folder")
    listing = "\n".join(f"{name} {item}" for name, item in sorted(items.items()))
    content = f"{client.meta.endpoint_url}\n{place.bucket}\n{listing}"
    folder = cache_folder() / "s3" / hashlib.sha256(content.encode()).hexdigest()[:32]
    if folder.exists():
        return folder
    stop = threading.Event()
    with ThreadPoolExecutor(_STREAMS) as streams:
        try:
            loading = [streams.submit(fetch_object, client, place.bucket, item, stop) for item in items.values()]
            loaded = [one.result() for one in loading]
        except BaseException:
            stop.set()
            streams.shutdown(wait=False, cancel_futures=True)
            raise
    try:
        with whole_folder(folder) as aside:
            for name, file in zip(items, loaded, strict=True):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                # A second name of the same file: folders that share an object share its room.
                os.link(file, aside / name)
    except FileExistsError:
        if not folder.exists():
            raise
        # Another process fetched the same objects meanwhile.
    return folder


def _refuse_taken(client: Any, place: Address) -> None:
    names = {item["Key"].removeprefix(f"{place.key}/") for item in _list(client, place)}
    if MANIFEST in names or (names and UNFINISHED not in names):
        raise StorageError("something is there already, and left alone; name another place")


def _put(client: Any, place: Address, name: str, body: bytes, **conditions: str) -> None:
    client.put_object(Bucket=place.bucket, Key=f"{place.key}/{name}", Body=body, **conditions)


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _stopping(stop: threading.Event) -> Callable[[int], None]:
    """What the transfer calls after some bytes; an error in it ends the transfer."""

    def sent(_: int) -> None:
        if stop.is_set():
            raise StorageError("stopped before its end")

    return sent
