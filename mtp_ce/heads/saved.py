"""The files of saved heads, checked against each other before anything is built. Needs neither torch nor transformers.

    mtp_heads.json           {"kind": "residual", "hidden_size": 576, "horizon": 4}
                             {"kind": "sequential", "hidden_size": 576, "horizon": 4, "format": 2, "shared": true}
    mtp_heads.safetensors    the parameters; its header lists their names and shapes

Both may be damaged or come from anywhere: a horizon of a million would build as many layers before three tensors are
read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from mtp_ce.heads.kinds import CONFIG_FILE, KINDS, is_in_model
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
        format: that of `mtp_ce.heads.kinds.HeadKind`.
        shared: whether one module serves all extra heads.
        in_model: whether the parameters are among the model's files.
    """

    kind: str
    hidden_size: int
    horizon: int
    format: int = 1
    shared: bool = False
    in_model: bool = False


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
        kind, hidden_size, horizon = (config.pop(name) for name in SavedConfig._fields[:3])
        version, shared = config.pop("format", 1), config.pop("shared", False)
        in_model = config.pop("in_model", False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} can't be read ({type(error).__name__}); {expected}") from None
    if config:
        raise ValueError(f"{file} has the unknown key {min(config)[:60]!r}, perhaps of a later version; {expected}")
    wrong = {name: x for name, x in (("hidden_size", hidden_size), ("horizon", horizon)) if not _counts(x)}
    if not (isinstance(kind, str) and len(kind) <= _LONGEST_PATH and (kind in KINDS or is_class_path(kind))):
        wrong["kind"] = kind
    elif not isinstance(shared, bool) or (shared and kind in KINDS and not KINDS[kind].shares):
        wrong["shared"] = shared
    if not isinstance(in_model, bool) or (in_model and kind in KINDS and not is_in_model(kind)):
        wrong["in_model"] = in_model
    if not _counts(version):
        wrong["format"] = version
    for name, value in wrong.items():
        raise ValueError(f"{file} has {name} {str(value)[:60]!r}; {expected}")
    if kind in KINDS:
        check_format(file, kind, version, KINDS[kind].format)
    return SavedConfig(kind, hidden_size, horizon, version, shared, in_model)


def check_format(file: str | Path, kind: str, saved: int, known: int) -> None:
    """Check that saved parameters mean what this version of the heads makes of them.

    Raises:
        ValueError: they don't.
    """
    if saved != known:
        version = "an earlier" if saved < known else "a later"
        raise ValueError(
            f"{file} has heads of the kind {kind!r} in format {saved}, of {version} version of mtp_ce, which computes "
            f"other hidden states from them; expected format {known}: train them again"
        )


def check_tensors(file: Path, saved: SavedConfig) -> None:
    """Check the header of mtp_heads.safetensors against the configuration, without reading a tensor.

    Args:
        file: the tensors.
        saved: the content of mtp_heads.json beside it.

    Raises:
        ValueError: the file is damaged, or holds heads of another number or size.
    """
    if saved.in_model:  # among the model's
        return
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
    modules = min(saved.horizon - 1, 1) if saved.shared else saved.horizon - 1
    if len(numbers) != modules or max(numbers, default=-1) != modules - 1:
        shared, expected = ("", "one fewer than that") if not saved.shared else (" and shared true", "one for all")
        raise ValueError(
            f"{file} has {len(numbers)} extra heads, and {CONFIG_FILE} beside it has horizon {saved.horizon}{shared}; "
            f"expected {expected}: save the heads again"
        )
    widths = {size for shape in shapes.values() for size in shape}
    if shapes and saved.hidden_size not in widths:
        raise ValueError(
            f"{file} has no tensor of width {saved.hidden_size}, the hidden_size in {CONFIG_FILE} beside it; save the "
            "heads again"
        )


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
