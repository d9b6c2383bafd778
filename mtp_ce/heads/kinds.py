"""The kinds of prediction heads by name, with what must be known of them before torch is loaded.

A head kind is one file with a subclass of `mtp_ce.heads.protocol.Heads`, and one line here. A class of your own needs
no line: its path, `package.module:Class`, is accepted wherever a name is.
"""

from __future__ import annotations

from typing import NamedTuple


class HeadKind(NamedTuple):
    """One kind of heads.

    Attributes:
        path: `package.module:Class` of the heads.
        extra: whether there are heads beside head 0, so that a recipe can ask for them.
        parameters: whether the extra heads have parameters of their own.
        stack: the list of modules with one entry for each extra head, as parameters are named; None without parameters.
        layouts: the layouts of `mtp_ce.serving.layouts` that the heads can be exported to.
        drafts: as `Heads.drafts`.
        shares: whether one module can serve all extra heads (`shared=True`).
        in_model: whether the parameters are read from the model's files, and saved among them where the model is saved
            as a whole.
        format: what saved parameters mean, counted up where the same tensors are used in another way: heads of another
            format are not loaded.
    """

    path: str
    extra: bool = True
    parameters: bool = True
    stack: str | None = None
    layouts: tuple[str, ...] = ()
    drafts: bool = True
    shares: bool = False
    in_model: bool = False
    format: int = 1


KINDS: dict[str, HeadKind] = {
    "none": HeadKind("mtp_ce.heads.none:NoHeads", extra=False, parameters=False, drafts=False),
    "residual": HeadKind("mtp_ce.heads.residual:MTPHeads", stack="blocks", layouts=("heads", "medusa")),
    "layer": HeadKind("mtp_ce.heads.layer:LayerHeads", stack="layers", layouts=("heads",)),
    # Format 1 read the trunk's hidden state before its final norm.
    "sequential": HeadKind(
        "mtp_ce.heads.sequential:SequentialHeads",
        stack="layers",
        layouts=("heads", "mimo", "deepseek", "qwen"),
        shares=True,
        format=2,
    ),
    # Its tensors are in the model's files, under the names they had there.
    "native": HeadKind("mtp_ce.heads.native:NativeHeads", layouts=("deepseek", "qwen"), in_model=True),
    "teacher_forcing": HeadKind("mtp_ce.heads.teacher_forcing:TeacherForcedHeads", parameters=False, drafts=False),
}

PATHS = {name: kind.path for name, kind in KINDS.items()}
EXTRA_PATHS = {name: kind.path for name, kind in KINDS.items() if kind.extra}

# Files of the heads, beside those of the model.
CONFIG_FILE = "mtp_heads.json"
TENSORS_FILE = "mtp_heads.safetensors"


def may_be_shared(name: str) -> bool:
    """Return whether one module can serve all extra heads of this kind, as `may_have_parameters` does."""
    return name not in KINDS or KINDS[name].shares


def may_draft(name: str) -> bool:
    """Return whether heads of this kind draft, as `may_have_parameters` does."""
    return name not in KINDS or KINDS[name].drafts


def may_have_parameters(name: str) -> bool:
    """Return whether heads of this kind have parameters, as far as can be known without importing their class."""
    return name not in KINDS or KINDS[name].parameters


def is_in_model(name: str) -> bool:
    """Return whether heads of this kind are read from a model's own files, and saved among them."""
    return name in KINDS and KINDS[name].in_model
