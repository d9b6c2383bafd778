"""The layouts that `export-mtp` writes, by name. Needs neither torch nor transformers.

A layout is one file with a function (wrapper, folder), and one line here.
"""

from __future__ import annotations

from typing import NamedTuple

from mtp_ce.heads.kinds import CONFIG_FILE, TENSORS_FILE


class Layout(NamedTuple):
    """One layout.

    Attributes:
        path: `package.module:function` that writes it, called with a wrapper and a folder.
        about: its line in `export-mtp --help`.
        what: the content, in messages.
        of_heads: whether it holds heads, so that their kind must support it (`HeadKind.layouts`).
        copied: files of a checkpoint that are the layout as they are, so that no model is loaded.
        tokenizer: whether the model's tokenizer is written beside it.
        vllm_method: method of vLLM's speculative configuration that reads it.
    """

    path: str
    about: str
    what: str = "heads"
    of_heads: bool = True
    copied: tuple[str, ...] = ()
    tokenizer: bool = False
    vllm_method: str | None = None


LAYOUTS: dict[str, Layout] = {
    "base": Layout(
        "mtp_ce.serving.base:export_base",
        "the model alone with its tokenizer, adapters merged: AutoModelForCausalLM.from_pretrained",
        what="model",
        of_heads=False,
        tokenizer=True,
    ),
    "heads": Layout(
        "mtp_ce.serving.heads:export_heads",
        'the heads alone: inside a base\'s folder MTPWrapper.from_pretrained; MTPHeads.from_pretrained if "residual"',
        copied=(CONFIG_FILE, TENSORS_FILE),
    ),
    "medusa": Layout(
        "mtp_ce.serving.medusa:export_medusa",
        '"residual" heads as a draft model, which vLLM serves beside the base',
        vllm_method="medusa",
    ),
}

PATHS = {name: layout.path for name, layout in LAYOUTS.items()}
