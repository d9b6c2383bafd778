"""The layouts by name."""

from __future__ import annotations

from mtp_ce.heads.modules import deepseek, mimo, qwen
from mtp_ce.heads.modules.layout import ModuleLayout

MODULE_LAYOUTS: dict[str, ModuleLayout] = {layout.LAYOUT.name: layout.LAYOUT for layout in (deepseek, mimo, qwen)}
