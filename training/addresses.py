"""Addresses as they may be shown and stored: scheme, host, port and path, and nothing else.

    shown("https://me:secret@host:5000/mlflow?token=abc")     "https://***@host:5000/mlflow?***"

`***` stands for user name and password, and for query and fragment. An address that can't be taken apart for certain,
such as one with a / in its password, is shown by its scheme alone: "https://***".
"""

from __future__ import annotations

import re
from typing import Any

# An address ends at white space, punctuation at its end belongs to the sentence; pathlib drops one of two slashes.
_ADDRESS = re.compile(r"([\w.+-]*)(:/{1,2})(\S*?)([\"'`)>,;:.]*)(?=\s|$)")

# A path with a query and without scheme and host, as HTTP clients quote them.
_QUERY = re.compile(r"(/[^\s?]*)\?[^\s=/?]+=\S*")

_HOST = r"(?:[\w.~%-]*|\[[0-9A-Fa-f:.%]+\])(?::\d+)?"
_HOSTS = re.compile(rf"{_HOST}(?:,{_HOST})*")

# A fragment that is the path of a page, as in MLflow's own addresses.
_PAGE = re.compile(r"#/[\w/-]*")


def shown(text: str) -> str:
    """Return a text with each address in it as it may be shown; the result is its own shown form."""
    if ":/" in text:
        text = _ADDRESS.sub(lambda match: f"{match[1]}{match[2]}{_shown(match[1].lower(), match[3])}{match[4]}", text)
    return _QUERY.sub(r"\1?***", text) if "?" in text else text


def shown_values(value: Any) -> Any:
    """Return nested groups and lists with every text in them as it may be shown."""
    if isinstance(value, dict):
        return {key: shown_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [shown_values(part) for part in value]
    # Without an address it is a path, in which ? and = are only characters.
    return shown(value) if isinstance(value, str) and "://" in value else value


def is_shortened(text: str) -> bool:
    """Return whether a text is an address without what may not be shown."""
    return "://" in text and "***" in text


def is_unclear(address: str) -> bool:
    """Return whether user name, password and host of an address can't be told apart."""
    return shown(address).endswith("://***")


def _shown(kind: str, rest: str) -> str:
    """Return the shown form of what follows the scheme `kind`."""
    if not re.search("[@?#:]", rest):
        return rest
    authority, slash, tail = rest.partition("/")
    user, at, host = authority.rpartition("@")
    host, query = _cut(host)
    # In S3, # is a character of names.
    path, more = _cut(tail, "[?]" if kind == "s3" else "[?#]")
    # Where there can be a password, an @ in the path may be its end.
    at_in_path = (kind == "s3" and not at) or (not authority and kind.startswith(("sqlite", "file")))
    port_of_bucket = kind == "s3" and ":" in host
    if _cut(user)[1] or ("@" in tail and not at_in_path) or port_of_bucket or not _HOSTS.fullmatch(host):
        return "***"
    if query:
        # It may have slashes of its own.
        slash, path, more = "", "", query
    hidden = "" if not more or _PAGE.fullmatch(more) else "?***"
    return f"{'***@' if at else ''}{host}{slash}{path}{hidden or more}"


def _cut(text: str, marks: str = "[?#]") -> tuple[str, str]:
    """Split a text before its query or fragment."""
    end = re.search(marks, text)
    return (text[: end.start()], text[end.start() :]) if end else (text, "")
