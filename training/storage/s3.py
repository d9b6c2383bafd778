"""A client of S3, and what goes wrong with one told in one line.

    with connected("model.source", "s3://bucket/prefix", "read") as client:
        client.list_objects_v2(Bucket="bucket")

Credentials, region, endpoint, addressing style and checksums come from boto3's usual places: the environment, the
files of AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE, the machine's role. No message names a credential.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from mtp_ce.training.errors import RecipeError

SCHEME = "s3://"

# boto3 would wait a minute for a machine that does not answer, and for each attempt again.
CONNECT_S = 5
READ_S = 30

# As many as there are threads that read or write at once, or urllib3 opens a connection for each request.
_CONNECTIONS = 32

# What follows is said of these answers; of others, what S3 says.
_MEANINGS = {
    "NoSuchBucket": "there is no such bucket",
    "NoSuchKey": "there is no such object",
    "InvalidAccessKeyId": "the endpoint does not know this access key",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "InvalidBucketName": "this is no name that a bucket can have",
    "AccessDenied": "these credentials may not do that",
    "ExpiredToken": "the credentials have expired; fetch new ones",
}

_LONGEST_REASON = 240


class StorageError(Exception):
    """What is wrong with the objects themselves; its message is one line."""


class ChangedError(StorageError):
    """An object is another one than a moment ago, or gone."""


@dataclass(frozen=True)
class Address:
    """A place in S3.

    Attributes:
        bucket: its bucket.
        key: of the object, or of the folder without a slash at its end.
    """

    bucket: str
    key: str


def is_s3(source: str) -> bool:
    """Whether this names a place in S3."""
    return source.startswith(SCHEME)


def parse_address(key: str, address: str) -> Address:
    """Read s3://bucket/prefix.

    Args:
        key: the recipe's key that holds the address, for messages.
        address: what it holds.

    Raises:
        RecipeError: it is no such address.
    """
    bucket, _, inside = address.removeprefix(SCHEME).partition("/")
    inside = inside.rstrip("/")
    if "@" in bucket:
        # Shown, it would be in logs and in the run's recipe.
        raise RecipeError(f"{key} has credentials in its address; {_PLACES}, and give s3://bucket/prefix alone")
    if not is_s3(address) or not bucket or not inside:
        raise RecipeError(f"{key} is '{address}'; expected s3://bucket/prefix")
    return Address(bucket, inside)


_PLACES = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


@contextmanager
def connected(key: str, address: str, verb: str) -> Iterator[Any]:
    """Give a client; what boto3 raises in the block becomes one line.

    Args:
        key: the recipe's key that holds the address.
        address: what the block works on.
        verb: what it can't be if the block fails: "read", "written", "deleted".

    Raises:
        RecipeError: boto3 is missing, credentials or endpoint are wrong, S3 refuses or does not answer, an object is
            damaged, or a local file can't be read or written.
    """
    if find_spec("boto3") is None:
        raise RecipeError(f"{key} is '{address}', which needs boto3: pip install 'mtp_ce[train]'")
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    # Its retry waits 2 ** attempt * random() seconds; AWS_MAX_ATTEMPTS says how often, otherwise three times in all.
    config = Config(
        retries={"mode": "standard"},
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        max_pool_connections=_CONNECTIONS,
    )
    session = None
    try:
        # boto3 reads AWS_DEFAULT_REGION alone; every other client of S3 reads AWS_REGION first.
        session = boto3.session.Session(region_name=os.environ.get("AWS_REGION") or None)
        try:
            client = session.client("s3", config=config)
        except ValueError as error:
            raise StorageError(str(error)) from None
        yield client
    except (BotoCoreError, ClientError, Boto3Error, StorageError, OSError) as error:
        reason = _without_secrets(_reason(error), session)
        raise RecipeError(f"{key} '{address}' can't be {verb}: {reason}") from None


def error_code(error: BaseException) -> str:
    """Give the code of S3's answer, or of the one that led to this error; nothing where there was no answer."""
    # The transfer manager raises an error of its own, in whose context S3's is.
    told = error.__context__ if type(error).__module__ == "boto3.exceptions" else error
    response = getattr(told, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _reason(error: BaseException) -> str:
    from botocore.exceptions import ConnectionError as NoConnectionError
    from botocore.exceptions import HTTPClientError, NoCredentialsError, PartialCredentialsError

    code, text = error_code(error), str(error)
    if meaning := _MEANINGS.get(code):
        return f"{meaning} ({code})"
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return f"there are no whole credentials; {_PLACES}"
    if isinstance(error, NoConnectionError | HTTPClientError):
        text = f"no answer; look at AWS_ENDPOINT_URL_S3 and the network ({text})"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return text


def _without_secrets(text: str, session: Any) -> str:
    """One line without credentials: those of the session, of the environment, and inside URLs."""
    secrets = {os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")}
    found = _credentials(session)
    secrets |= {getattr(found, name, None) for name in ("access_key", "secret_key", "token")}
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    text = re.sub(r"(://)[^/@\s]*@", r"\1***@", text)
    text = re.sub(r"(?i)\b((?:X-Amz-[\w-]+|AWSAccessKeyId|Signature)=)[^&\s\"']+", r"\1***", text)
    line = " ".join(text.split())
    return f"{line[: _LONGEST_REASON - 3]}..." if len(line) > _LONGEST_REASON else line


def _credentials(session: Any) -> Any:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        found = session and session.get_credentials()
        return found and found.get_frozen_credentials()
    except (BotoCoreError, ClientError):
        return None  # there are none, which is what the message is about
