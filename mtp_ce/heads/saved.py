"""The files of saved heads, checked against each other before anything is built. Needs neither torch nor transformers.

    mtp_heads.json           {"kind": "residual", "hidden_size": 576, "horizon": 4}
    mtp_heads.safetensors    the parameters; its header lists their names and shapes

Both may be damaged or come from anywhere: a horizon of a million would build as many layers before three tensors are
read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from mtp_ce.heads.kinds import CONFIG_FILE, KINDS
from mtp_ce.registry import is_class_path

# Of heads of a class of your own, whose tensors are not known; many more than any model has.
MAX_HORIZON = 4096
_MAX_BYTES = 1 << 16
_LONGEST_PATH = 200


class SavedConfig(NamedTuple):
    """The content of mtp_heads.json.

    Attributes:
        kind: a name of `mtp_ce.heads.kinds.KINDS`, or a class path.
        hidden_size: D.
        horizon: H.
    """

    kind: str
    hidden_size: int
    horizon: int


def read_config(file: Path) -> SavedConfig:
    """Read mtp_heads.json.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is not what `Heads.save_pretrained` writes.
    """
    expected = 'expected {"kind": "residual", "hidden_size": 576, "horizon": 4} or the like; save the heads again'
    try:
        with file.open("rb") as opened:
            config: Any = json.loads(opened.read(_MAX_BYTES))
        kind, hidden_size, horizon = (config.pop(name) for name in SavedConfig._fields)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} can't be read ({type(error).__name__}); {expected}") from None
    if config:
        raise ValueError(f"{file} has the unknown key {min(config)[:60]!r}, perhaps of a later version; {expected}")
    wrong = {name: x for name, x in (("hidden_size", hidden_size), ("horizon", horizon)) if not _counts(x)}
    if not (isinstance(kind, str) and len(kind) <= _LONGEST_PATH and (kind in KINDS or is_class_path(kind))):
        wrong["kind"] = kind
    for name, value in wrong.items():
        raise ValueError(f"{file} has {name} {str(value)[:60]!r}; {expected}")
    return SavedConfig(kind, hidden_size, horizon)


def check_tensors(file: Path, saved: SavedConfig) -> None:
    """Check the header of mtp_heads.safetensors against the configuration, without reading a tensor.

    Args:
        file: the tensors.
        saved: the content of mtp_heads.json beside it.

    Raises:
        ValueError: the file is damaged, or holds heads of another number or size.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            shapes = {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); save the heads again") from None
    known = KINDS.get(saved.kind)
    if known is None or known.stack is None:
        if saved.horizon > MAX_HORIZON:
            raise ValueError(
                f"{file.with_name(CONFIG_FILE)} has horizon {saved.horizon}; expected at most {MAX_HORIZON}"
            )
        return
    numbers = {int(match[1]) for name in shapes if (match := re.match(rf"{known.stack}\.([0-9]{{1,9}})\.", name))}
    # Not a set of `range(horizon - 1)`, which may be longer than memory.
    if len(numbers) != saved.horizon - 1 or max(numbers, default=-1) != saved.horizon - 2:
        raise ValueError(
            f"{file} has {len(numbers)} extra heads, and {CONFIG_FILE} beside it has horizon {saved.horizon}; expected "
            f"one fewer than that: save the heads again"
        )
    widths = {size for shape in shapes.values() for size in shape}
    if shapes and saved.hidden_size not in widths:
        raise ValueError(
            f"{file} has no tensor of width {saved.hidden_size}, the hidden_size in {CONFIG_FILE} beside it; save the "
            "heads again"
        )


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
