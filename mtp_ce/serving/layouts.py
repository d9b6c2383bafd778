"""The layouts that `export-mtp` writes, by name. Needs neither torch nor transformers.

A layout is one file with a function (wrapper, folder), and one line here. A function whose folder an engine serves
returns how.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    """

    path: str
    about: str
    what: str = "heads"
    of_heads: bool = True
    copied: tuple[str, ...] = ()
    tokenizer: bool = False


class Serving(NamedTuple):
    """How vLLM serves an exported folder.

    Attributes:
        method: of its speculative configuration.
        tokens: num_speculative_tokens, the most that the heads were trained for.
        overrides: keys that it reads in the configuration of the model served, and that model does not have.
    """

    method: str
    tokens: int
    overrides: Mapping[str, Any] = {}

    def command(self, base: str, folder: str) -> str:
        """Return the command.

        Args:
            base: the folder of the model.
            folder: the exported one.
        """
        speculation = {"method": self.method, "model": folder, "num_speculative_tokens": self.tokens}
        words = ["vllm", "serve", base]
        if self.overrides:
            words += ["--hf-overrides", json.dumps(self.overrides)]
        return shlex.join([*words, "--speculative-config", json.dumps(speculation)])


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
    ),
    "mimo": Layout(
        "mtp_ce.serving.mimo:export_mimo",
        'a "sequential" module of a Llama, Qwen2 or Qwen3 as a draft model, which vLLM serves beside the base',
    ),
}

PATHS = {name: layout.path for name, layout in LAYOUTS.items()}
