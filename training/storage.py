"""Objects in S3, through boto3: credentials, region and endpoint come from its usual places.

Bodies are kept in the cache under their ETags, so an unchanged model is loaded once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

from mtp_ce.training.atomic import whole_folder
from mtp_ce.training.schema import RecipeError
from mtp_ce.training.tokenizer import cache_folder


def fetch_folder(key: str, address: str) -> Path:
    """Download every object below an address into the cache, and give the folder.

    Args:
        key: the recipe's key that holds the address, for messages.
        address: s3://bucket/prefix.

    Raises:
        RecipeError: the address is not one, nothing is there, or S3 refuses or does not answer.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/") + "/"
    if not bucket or prefix == "/":
        raise RecipeError(f"{key} is '{address}'; expected s3://bucket/prefix")
    try:
        client = boto3.client("s3")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        objects: list[dict[str, Any]] = [item for page in pages for item in page.get("Contents", [])]
        objects = [item for item in objects if not item["Key"].endswith("/")]
        if not objects:
            raise RecipeError(f"{key} '{address}' has no objects below it")
        listing = "\n".join(f"{item['Key']} {item['ETag']}" for item in objects)
        folder = cache_folder() / "s3" / hashlib.sha256(f"{bucket}\n{listing}".encode()).hexdigest()[:32]
        if folder.exists():
            return folder
        with whole_folder(folder) as aside:
            for item in objects:
                inside = PurePosixPath(item["Key"].removeprefix(prefix))
                if ".." in inside.parts or inside.is_absolute():
                    raise RecipeError(f"{key} '{address}' holds '{item['Key']}', which leads out of its folder")
                (aside / inside).parent.mkdir(parents=True, exist_ok=True)
                client.download_file(bucket, item["Key"], str(aside / inside))
    except FileExistsError:
        pass  # another process fetched the same objects meanwhile
    except (BotoCoreError, ClientError) as error:
        raise RecipeError(f"{key} '{address}' can't be read: {' '.join(str(error).split())}") from None
    return folder
