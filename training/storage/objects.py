"""Objects of S3 in the cache: each is loaded once, and a body that was cut off goes on where it ended.

    cache/s3/objects/<hash of endpoint, bucket, key, ETag>         whole objects
    cache/s3/objects/<the same>.part                               what has come of one

An object that changes has another ETag, hence another file here. The rest of a body is asked for by Range under
If-Match with the ETag of its beginning, so that no file is made of two.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import threading
import zlib
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

from mtp_ce.training.storage.cache import cache_folder
from mtp_ce.training.storage.s3 import Address, ChangedError, StorageError, error_code

_CHUNK = 1 << 20

# Broken connections in a row without a byte in between; the pauses between them add up to 12 seconds.
_FRUITLESS = 6
_FIRST_PAUSE_S = 0.4

# IfMatch refused, and what a HEAD says of it, whose answer has no body.
_CHANGED = {"PreconditionFailed", "412", "NoSuchKey", "404"}


@dataclass(frozen=True)
class Stored:
    """An object as S3 lists it.

    Attributes:
        key: its whole key.
        etag: changes with its content.
        size: in bytes.
        sha256: of its content, where a manifest says it.
    """

    key: str
    etag: str
    size: int
    sha256: str | None = None


def look_up(client: Any, place: Address) -> Stored:
    """Ask for one object, and read a byte of it; a HEAD would not say why it is refused."""
    from botocore.exceptions import ClientError

    try:
        given = client.get_object(Bucket=place.bucket, Key=place.key, Range="bytes=0-0")
    except ClientError as error:
        if error_code(error) != "InvalidRange":
            raise
        # An empty one has no first byte.
        given = client.get_object(Bucket=place.bucket, Key=place.key)
    given["Body"].close()
    size = given["ContentRange"].rpartition("/")[2] if "ContentRange" in given else given["ContentLength"]
    return Stored(place.key, given["ETag"], int(size))


def fetch_object(client: Any, bucket: str, item: Stored, stop: threading.Event) -> Path:
    """Give the file in the cache that an object is in, loaded or loaded to its end where it is not whole.

    Args:
        client: of S3.
        bucket: the object's.
        item: the object.
        stop: ends the loading early; what has come stays for the next time.

    Raises:
        ChangedError: it is another object than `item` says.
        StorageError: it does not have the content that it should have.
    """
    name = "\n".join((client.meta.endpoint_url, bucket, item.key, item.etag, item.sha256 or ""))
    whole = cache_folder() / "s3" / "objects" / hashlib.sha256(name.encode()).hexdigest()[:32]
    part = whole.with_suffix(".part")
    if whole.exists():
        return whole
    whole.parent.mkdir(parents=True, exist_ok=True)
    with part.open("a+b") as file:
        # Another process may be loading it: wait for that one, and look again.
        fcntl.flock(file, fcntl.LOCK_EX)
        if whole.exists():
            if part.exists() and os.path.samestat(part.stat(), os.fstat(file.fileno())):
                part.unlink()
            return whole
        if file.seek(0, os.SEEK_END) > item.size:
            file.truncate(0)
        resumed = _load(client, bucket, item, file, stop)
        file.flush()
        try:
            _verify(client, bucket, item, file, resumed)
        except StorageError:
            file.truncate(0)
            raise
        part.rename(whole)
    return whole


def _load(client: Any, bucket: str, item: Stored, file: BufferedRandom, stop: threading.Event) -> bool:
    """Append to a file what it lacks; says whether the body came in more than one piece."""
    from botocore.exceptions import ClientError, FlexibleChecksumError, HTTPClientError, IncompleteReadError
    from botocore.exceptions import ConnectionError as NoConnectionError

    fruitless = pieces = 0
    resumed = False
    while (have := file.seek(0, os.SEEK_END)) < item.size or not pieces:
        pieces += 1
        problem: Exception | None = None
        try:
            rest = {"Range": f"bytes={have}-"} if have else {}
            given = client.get_object(Bucket=bucket, Key=item.key, IfMatch=item.etag, **rest)
            if have and "ContentRange" not in given:
                # A server that knows no ranges sends everything again.
                file.truncate(0)
            resumed = resumed or bool(have)
            for chunk in given["Body"].iter_chunks(_CHUNK):
                file.write(chunk)
                if stop.is_set():
                    raise StorageError("stopped")
        except ClientError as error:
            if error_code(error) in _CHANGED:
                raise ChangedError(f"'{item.key}' changes while it is read; try again") from None
            raise
        except FlexibleChecksumError as error:
            file.truncate(0)
            problem = error
        except (HTTPClientError, NoConnectionError, IncompleteReadError) as error:
            problem = error
        fruitless = 0 if file.seek(0, os.SEEK_END) > have else fruitless + 1
        if fruitless == _FRUITLESS:
            raise problem or StorageError(f"'{item.key}' ends after {have:,} of {item.size:,} bytes")
        if problem and stop.wait(_FIRST_PAUSE_S * 2 ** (fruitless - 1) if fruitless else 0):
            raise StorageError("stopped")
    return resumed


def _verify(client: Any, bucket: str, item: Stored, file: BufferedRandom, resumed: bool) -> None:
    if (size := file.seek(0, os.SEEK_END)) != item.size:
        raise StorageError(f"'{item.key}' came with {size:,} bytes and should have {item.size:,}")
    file.seek(0)
    if item.sha256 is not None:
        if hashlib.file_digest(file, "sha256").hexdigest() != item.sha256:
            raise StorageError(f"'{item.key}' has another content than its manifest says; upload it again")
    # botocore compares the checksum of a body that comes as a whole; nobody does for one in pieces.
    elif resumed and client.meta.config.response_checksum_validation == "when_supported":
        head = client.head_object(Bucket=bucket, Key=item.key, IfMatch=item.etag, ChecksumMode="ENABLED")
        for algorithm in ("CRC32", "SHA1", "SHA256"):
            expected = head.get(f"Checksum{algorithm}")
            # A dash is followed by a number of parts: a checksum of their checksums.
            if expected and "-" not in expected and _checksum(file, algorithm) != expected:
                raise StorageError(f"'{item.key}' does not fit its {algorithm} checksum; try again")


def _checksum(file: BufferedRandom, algorithm: str) -> str:
    file.seek(0)
    if algorithm != "CRC32":
        return base64.b64encode(hashlib.file_digest(file, algorithm.lower()).digest()).decode()
    crc = 0
    while chunk := file.read(_CHUNK):
        crc = zlib.crc32(chunk, crc)
    return base64.b64encode(crc.to_bytes(4, "big")).decode()
