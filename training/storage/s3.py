"""The S3 client, and its errors as one line.

    with connected("model.source", "s3://bucket/prefix", "read") as (client, location):
        client.list_objects_v2(Bucket=location.bucket, Prefix=location.key)

Credentials, region, endpoint, addressing style and checksums come from where boto3 looks for them: the environment, the
files of AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE, the machine's role. No message contains a credential.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from mtp_ce.training.addresses import shown
from mtp_ce.training.errors import RecipeError

SCHEME = "s3://"

# boto3's own timeouts are a minute each, for every attempt.
CONNECT_S = 5
READ_S = 30

# At least the number of threads of a transfer; urllib3 opens a new connection for every request beyond it.
_CONNECTIONS = 32

_LONGEST_REASON = 240

# The way out where an address has credentials, or none are found.
SET_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"

# Error codes of S3 with an explanation of ours; for the others the message is S3's.
_EXPLANATIONS = {
    "NoSuchBucket": "there is no such bucket",
    "NoSuchKey": "there is no such object",
    "InvalidAccessKeyId": "the endpoint does not know this access key",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "InvalidBucketName": "this is not a valid bucket name",
    "AccessDenied": "these credentials lack the permission",
    "ExpiredToken": "the credentials have expired; fetch new ones",
}


class StorageError(Exception):
    """A problem of the objects themselves; its message is one line."""


class ReadAgainError(StorageError):
    """A read that may succeed when it is repeated: the object changed meanwhile, or its body came damaged."""


@dataclass(frozen=True)
class Location:
    """A location in S3.

    Attributes:
        bucket: its bucket.
        key: of an object, or the prefix of a folder without the slash at its end.
    """

    bucket: str
    key: str


def is_s3(source: str) -> bool:
    """Return whether a source is an address in S3."""
    return source.startswith(SCHEME)


@contextmanager
def connected(key: str, address: str, verb: str) -> Iterator[tuple[Any, Location]]:
    """Yield a client and the address, parsed; errors of boto3 and of files in the block become one line.

    Args:
        key: the recipe's key that holds the address.
        address: s3://bucket/prefix.
        verb: what failed if the block fails: "read", "written" or "deleted".

    Raises:
        RecipeError: the address is malformed, boto3 is missing, credentials or endpoint are wrong, S3 refuses or does
            not answer, an object is damaged, or a local file can't be read or written.
    """
    location = _parse(key, address)
    if find_spec("boto3") is None:
        raise RecipeError(f"{key} is '{address}', which needs boto3: pip install 'mtp_ce[train]'")
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    # "standard" waits 2 ** attempt * random() seconds between attempts: three, or AWS_MAX_ATTEMPTS.
    config = Config(
        retries={"mode": "standard"},
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        max_pool_connections=_CONNECTIONS,
    )
    session = None
    try:
        # boto3 reads AWS_DEFAULT_REGION only; every other S3 client reads AWS_REGION first.
        session = boto3.session.Session(region_name=os.environ.get("AWS_REGION") or None)
        try:
            client = session.client("s3", config=config)
        except ValueError as error:
            raise StorageError(str(error)) from None
        yield client, location
    except (BotoCoreError, ClientError, Boto3Error, StorageError, OSError) as error:
        reason = _without_secrets(_reason(error), session)
        raise RecipeError(f"{key} '{address}' can't be {verb}: {reason}") from None


def error_code(error: BaseException) -> str:
    """Return the error code of S3's response behind an error; "" if there was no response."""
    # boto3's transfer raises its own error, with S3's as the context.
    cause = error.__context__ if type(error).__module__ == "boto3.exceptions" else error
    response = getattr(cause, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _parse(key: str, address: str) -> Location:
    bucket, _, inside = address.removeprefix(SCHEME).partition("/")
    inside = inside.rstrip("/")
    if shown(address) != address:
        raise RecipeError(
            f"{key} has credentials or a query in its address; {SET_CREDENTIALS}, and write s3://bucket/prefix"
        )
    if not is_s3(address) or not bucket or not inside:
        raise RecipeError(f"{key} is '{address}'; expected s3://bucket/prefix")
    return Location(bucket, inside)


def _reason(error: BaseException) -> str:
    from botocore import exceptions as botocore

    code = error_code(error)
    if explanation := _EXPLANATIONS.get(code):
        return f"{explanation} ({code})"
    if isinstance(error, botocore.NoCredentialsError | botocore.PartialCredentialsError):
        return f"credentials are missing or incomplete; {SET_CREDENTIALS}"
    broken = botocore.ConnectionError | botocore.HTTPClientError | botocore.IncompleteReadError
    if isinstance(error, broken | ConnectionError | TimeoutError):
        return f"no answer; check AWS_ENDPOINT_URL_S3 and the network ({error})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _without_secrets(text: str, session: Any) -> str:
    """One line without credentials: those of the session, of the environment, and inside URLs."""
    secrets = {os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")}
    credentials = _credentials(session)
    secrets |= {getattr(credentials, name, None) for name in ("access_key", "secret_key", "token")}
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    line = " ".join(shown(text).split())
    return f"{line[: _LONGEST_REASON - 3]}..." if len(line) > _LONGEST_REASON else line


def _credentials(session: Any) -> Any:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        credentials = session and session.get_credentials()
        return credentials and credentials.get_frozen_credentials()
    except (BotoCoreError, ClientError):
        return None  # the message is about the missing ones
