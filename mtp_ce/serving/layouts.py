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
    """How engines serve an exported folder.

    Attributes:
        method: of vLLM's speculative configuration.
        tokens: num_speculative_tokens, the most that the heads were trained for as vLLM runs them.
        overrides: keys that vLLM reads in the configuration of the model served, and that model does not have.
        beside: whether the folder is a draft model beside that model, and not all of it.
        note: a sentence on what vLLM computes otherwise; empty where all is as in training.
        sglang: the number of draft tokens in SGLang; 0 where it does not read the folder.
    """

    method: str
    tokens: int
    overrides: Mapping[str, Any] = {}
    beside: bool = True
    note: str = ""
    sglang: int = 0

    def commands(self, folder: str, base: str = "BASE") -> list[str]:
        """Return the command of every engine that reads the folder, vLLM's first.

        Args:
            folder: the exported one.
            base: the model that it is served beside.
        """
        model = base if self.beside else folder
        draft = {"model": folder} if self.beside else {}
        speculation = {"method": self.method, **draft, "num_speculative_tokens": self.tokens}
        overrides = ["--hf-overrides", json.dumps(self.overrides)] if self.overrides else []
        commands = [["vllm", "serve", model, *overrides, "--speculative-config", json.dumps(speculation)]]
        if self.sglang:
            path = ["--speculative-draft-model-path", folder] if self.beside else []
            chain = ["--speculative-num-steps", str(self.sglang), "--speculative-eagle-topk", "1"]
            chain += ["--speculative-num-draft-tokens", str(self.sglang + 1)]
            words = ["python", "-m", "sglang.launch_server", "--model-path", model]
            commands.append([*words, "--speculative-algorithm", "NEXTN", *path, *chain])
        return [*map(shlex.join, commands)]


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
    "deepseek": Layout(
        "mtp_ce.serving.deepseek:export_deepseek",
        'a DeepSeek-V3 or GLM-4-MoE with "sequential" or "native" heads as its MTP module, for vLLM',
        tokenizer=True,
    ),
    "qwen": Layout(
        "mtp_ce.serving.qwen:export_qwen",
        'a Qwen3-Next or Qwen3.5 with "sequential" or "native" heads as its MTP module, for vLLM',
        tokenizer=True,
    ),
}

PATHS = {name: layout.path for name, layout in LAYOUTS.items()}
