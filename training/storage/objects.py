"""Download of objects into the cache, each once, by boto3's own transfer.

    cache/s3/objects/<hash of endpoint, bucket, key, ETag, SHA-256>

s3transfer downloads in parts and retries each; every request has If-Match, so that no file mixes two versions of an
object. A file enters the cache once its size and its checksum are verified. An object that changes gets another ETag,
hence another file.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mtp_ce.training.storage.cache import cache_folder
from mtp_ce.training.storage.s3 import Location, ReadAgainError, StorageError, error_code

# If-Match failed, or the object is gone; a response to HEAD has no body, hence no other code than its status.
_CHANGED = {"PreconditionFailed", "412", "NoSuchKey", "404"}


@dataclass(frozen=True)
class StoredObject:
    """An object as S3 lists it.

    Attributes:
        key: its full key.
        etag: changes with its content.
        size: in bytes.
        sha256: of its content, if a manifest names it.
    """

    key: str
    etag: str
    size: int
    sha256: str | None = None


def look_up(client: Any, location: Location) -> StoredObject:
    """Return an object's ETag and size, from a read of its first byte: a HEAD does not explain a refusal."""
    from botocore.exceptions import ClientError

    try:
        response = client.get_object(Bucket=location.bucket, Key=location.key, Range="bytes=0-0")
    except ClientError as error:
        if error_code(error) != "InvalidRange":
            raise
        # An empty object has no first byte.
        response = client.get_object(Bucket=location.bucket, Key=location.key)
    response["Body"].close()
    size = response["ContentRange"].rpartition("/")[2] if "ContentRange" in response else response["ContentLength"]
    return StoredObject(location.key, response["ETag"], int(size))


def download(client: Any, bucket: str, objects: dict[str, StoredObject], folder: Path) -> None:
    """Write objects into a folder under their names, from the cache or from S3.

    Raises:
        ReadAgainError: an object is no longer the one listed, or its body came damaged.
        StorageError: an object does not have the listed size or the manifest's content.
    """
    cache = cache_folder() / "s3" / "objects"
    cache.mkdir(parents=True, exist_ok=True)
    downloads: list[_Download] = []
    done: SimpleQueue[tuple[_Download, Any]] = SimpleQueue()
    for name, item in objects.items():
        version = "\n".join((client.meta.endpoint_url, bucket, item.key, item.etag, item.sha256 or ""))
        cached = cache / hashlib.sha256(version.encode()).hexdigest()[:32]
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if cached.exists():
            os.link(cached, file)
        else:
            downloads.append(_Download(item, file, cached, done))
    with _transfers(client) as transfers:
        for one in downloads:
            transfers.download(bucket, one.item.key, str(one.file), {"IfMatch": one.item.etag}, [one])
        for _ in downloads:
            one, transfer = done.get()
            with _translated(one.item):
                transfer.result()
                in_parts = one.item.size >= transfers.config.multipart_threshold
                _verify(client, bucket, one.item, one.file, in_parts)
            # Another process may have downloaded the same object for another folder.
            with suppress(FileExistsError):
                os.link(one.file, one.cached)


def forget_objects(folder: Path) -> None:
    """Remove from the cache the objects that are files of a damaged folder: one file has both names."""
    files = {path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    for path in (cache_folder() / "s3" / "objects").iterdir():
        if path.stat().st_ino in files:
            path.unlink()


@dataclass(frozen=True)
class _Download:
    """One object on its way into a file, as a subscriber of s3transfer."""

    item: StoredObject
    file: Path
    cached: Path
    done: SimpleQueue[tuple[_Download, Any]]

    def on_queued(self, future: Any, **_: Any) -> None:
        # Otherwise every download begins with a HEAD.
        future.meta.provide_transfer_size(self.item.size)
        future.meta.provide_object_etag(self.item.etag)

    def on_done(self, future: Any, **_: Any) -> None:
        self.done.put((self, future))


@contextmanager
def _transfers(client: Any) -> Iterator[Any]:
    """Yield a transfer manager; after an error or an interrupt in the block it sends no more requests."""
    from boto3.s3.transfer import TransferConfig
    from s3transfer.manager import TransferManager

    ended = threading.Event()

    def refuse(**_: Any) -> None:
        # s3transfer ends a cancelled transfer between two reads, but first retries one whose server is silent.
        if ended.is_set():
            raise StorageError("the transfer was cancelled")

    client.meta.events.register("before-send.s3", refuse)
    try:
        with TransferManager(client, TransferConfig()) as manager:
            # s3transfer itself makes parts conditional, but not an object in one request.
            manager.ALLOWED_DOWNLOAD_ARGS = [*manager.ALLOWED_DOWNLOAD_ARGS, "IfMatch"]
            try:
                yield manager
            except BaseException:
                ended.set()
                raise
    finally:
        client.meta.events.unregister("before-send.s3", refuse)


@contextmanager
def _translated(item: StoredObject) -> Iterator[None]:
    """Translate the errors of s3transfer into those that `connected` reports."""
    from botocore.exceptions import ClientError, FlexibleChecksumError
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    try:
        yield
    except RetriesExceededError as error:
        raise error.last_exception from None
    except FlexibleChecksumError:
        raise ReadAgainError(f"'{item.key}' does not match its checksum; try again") from None
    except (ClientError, S3DownloadFailedError) as error:
        # s3transfer raises the latter where If-Match fails.
        if isinstance(error, ClientError) and error_code(error) not in _CHANGED:
            raise
        raise ReadAgainError(f"'{item.key}' changes while it is read; try again") from None


def _verify(client: Any, bucket: str, item: StoredObject, path: Path, in_parts: bool) -> None:
    from botocore.httpchecksum import Crc32Checksum, Sha1Checksum, Sha256Checksum

    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) != item.size:
            raise StorageError(f"'{item.key}' has {size:,} bytes and should have {item.size:,}")
        if item.sha256 is not None:
            if hashlib.file_digest(file, "sha256").hexdigest() != item.sha256:
                raise StorageError(f"'{item.key}' has other content than its manifest says; upload it again")
        # botocore verifies the checksum of a response with the whole object; nobody verifies that of one in parts.
        elif in_parts and client.meta.config.response_checksum_validation == "when_supported":
            head = client.head_object(Bucket=bucket, Key=item.key, IfMatch=item.etag, ChecksumMode="ENABLED")
            algorithms = {"CRC32": Crc32Checksum, "SHA1": Sha1Checksum, "SHA256": Sha256Checksum}
            for name, algorithm in algorithms.items():
                expected = head.get(f"Checksum{name}")
                # With a dash it is the checksum of the checksums of the uploaded parts.
                if expected and "-" not in expected and algorithm().handle(file) != expected:
                    raise ReadAgainError(f"'{item.key}' does not match its checksum; try again")
