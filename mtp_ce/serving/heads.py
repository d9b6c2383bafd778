"""Layout "heads": mtp_heads.json and mtp_heads.safetensors, without the model.

MTPWrapper.from_pretrained loads them beside a base, MTPHeads.from_pretrained alone where they are "residual".
"""

from __future__ import annotations

from pathlib import Path

from mtp_ce.heads.protocol import ModelWithHeads
from mtp_ce.serving.folders import describe


def export_heads(wrapper: ModelWithHeads, folder: str | Path) -> None:
    """Write the heads without the model.

    In the folder of `export_base` they make a checkpoint of `MTPWrapper.from_pretrained`.

    Args:
        wrapper: its heads are written, in their dtype.
        folder: created where it is missing.

    Raises:
        ValueError: there are no extra heads, or they have no parameters.
    """
    heads = wrapper.heads
    if next(heads.parameters(), None) is None:
        raise ValueError(
            f"wrapper has {describe(heads)}, which have no parameters; expected 'residual', 'layer' or 'sequential' "
            "heads and a horizon above 1. export_base writes the model."
        )
    heads.save_pretrained(folder)
