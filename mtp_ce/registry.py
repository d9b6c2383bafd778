"""Parts by name, from a table or as the user's own `package.module:Class`. Needs neither torch nor transformers."""

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_class_path(name: str) -> bool:
    """Return whether a name has the form `package.module:Class`."""
    return _PATH.fullmatch(name) is not None


def check_name(name: str, table: Mapping[str, str], argument: str) -> None:
    """Check that a name is in the table or has the form of a class path, without importing anything.

    Args:
        name: the name of a part.
        table: name -> `package.module:Class` of the parts that come with the package.
        argument: the argument or recipe key that the name came from, for the message.

    Raises:
        ValueError: it is neither.
    """
    if name not in table and not is_class_path(name):
        known = ", ".join(map(repr, table))
        raise ValueError(
            f"{argument} is {name!r}; expected one of {known}, or a class of your own as package.module:Class"
        )


def load_class(name: str, table: Mapping[str, str], argument: str) -> Any:
    """Import the class that a name stands for: of the table, or the user's own.

    Args:
        name: the name of a part, or `package.module:Class`.
        table: name -> `package.module:Class` of the parts that come with the package.
        argument: the argument or recipe key that the name came from, for the message.

    Returns:
        The class.

    Raises:
        ValueError: the name is neither in the table nor a class path, or its module or class can't be imported.
    """
    check_name(name, table, argument)
    module, _, attribute = table.get(name, name).partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in table:
            raise
        raise ValueError(f"{argument} is {name!r}, which can't be loaded: {error}") from error
    except Exception as error:  # a module of the user's own may raise anything
        raise ValueError(f"{argument} is {name!r}, which can't be loaded: {type(error).__name__}: {error}") from error
