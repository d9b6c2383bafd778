"""The layouts by name, and which of them a checkpoint's tensors are in."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from mtp_ce.heads.modules import deepseek, mimo, qwen
from mtp_ce.heads.modules.layout import ModuleLayout

MODULE_LAYOUTS: dict[str, ModuleLayout] = {layout.LAYOUT.name: layout.LAYOUT for layout in (deepseek, mimo, qwen)}


def layout_of(model_type: str) -> ModuleLayout:
    """Return the layout in which engines read a new module for models of a type: "mimo" beside dense ones."""
    own = next((layout for layout in MODULE_LAYOUTS.values() if model_type in layout.families), MODULE_LAYOUTS["mimo"])
    return own.of(model_type)


class StoredModules(NamedTuple):
    """The MTP modules of a checkpoint.

    Attributes:
        layout: the layout of all.
        prefixes: what the names of each module begin with.
    """

    layout: ModuleLayout
    prefixes: tuple[str, ...]


def stored_modules(names: Collection[str], layers: int) -> StoredModules | None:
    """Return the modules among the tensors of a checkpoint; None where they are in no layout of the table.

    Args:
        names: of the tensors that belong to no layer of the model.
        layers: the number of the model's own decoder layers.
    """
    for layout in MODULE_LAYOUTS.values():
        # The text model of a vision-language model lies deeper.
        inner = re.escape(layout.prefix.removeprefix("model."))
        root = r"(?:[\w.]+\.)?" if layout.prefix.startswith("model.") else ""
        numbered = inner.replace(re.escape("{k}"), r"(\d+)").replace(re.escape("{layer}"), r"(\d+)")
        pattern = re.compile(rf"({root}{numbered}){re.escape(layout.hidden_norm)}\.weight")
        found: dict[int, str] = {}
        for match in filter(None, map(pattern.fullmatch, names)):
            number = int(match[2]) if pattern.groups > 1 else 0
            found[number - layers if "{layer}" in layout.prefix else number] = match[1]
        if found and sorted(found) == [*range(len(found))]:
            return StoredModules(layout, tuple(found[k] for k in sorted(found)))
    return None
