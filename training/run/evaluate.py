"""Evaluate a checkpoint on held-out text, as a training does at its end."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mtp_ce.heads.kinds import CONFIG_FILE
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.training.config.schema import EvaluationRecipe
from mtp_ce.training.config.validation import DecodingConfig
from mtp_ce.training.console import say, warn
from mtp_ce.training.errors import RecipeError, refuse_unloadable
from mtp_ce.training.interrupt import ignore_sigterm
from mtp_ce.training.loop.finite import first_not_finite
from mtp_ce.training.metrics.decoding import DecodingResult, choose_prompts, measure_decoding
from mtp_ce.training.metrics.evaluation import Evaluation
from mtp_ce.training.metrics.head_scores import score_heads, validation_metrics
from mtp_ce.training.report.evaluation import print_evaluation, write_evaluation
from mtp_ce.training.run.folder import make_folder
from mtp_ce.training.run.inputs import Inputs, read_held_out
from mtp_ce.training.tracking.composite import Tracking


def evaluate(source: str, recipe: EvaluationRecipe, output: Path, out: Console | None = None) -> Evaluation:
    """Measure a checkpoint's heads on held-out text and in decoding; write evaluation.json and evaluation.png.

    Args:
        source: the checkpoint, named as in recipes. Without saved heads, only its next-token head is measured.
        recipe: the text, how much of it, and tracking.
        output: folder to create; it must not exist.
        out: where to print; None means the terminal.

    Raises:
        RecipeError: the checkpoint, the corpus or the output folder is missing or invalid.
    """
    transformers_logging.disable_progress_bar()
    out = out or Console()
    inputs = read_held_out(recipe, source, out)
    model = load_checkpoint(source, inputs.model_folders["CHECKPOINT"])
    # transformers wraps its own `to` in a way that hides `self` from type checkers.
    nn.Module.to(model, inputs.device).eval()
    say(out, f"model       {model.horizon} heads, {model.kind}; on {inputs.device}")
    make_folder(output, recipe)
    with Tracking(recipe, output, partial(warn, out), on_error=ignore_sigterm) as tracking:
        tracking.tags({"checkpoint": source})
        rows = inputs.rows(inputs.tokens.held_out)
        batches = rows.in_order(recipe.validation.batch_size, recipe.validation.rows)
        heads = score_heads(model, (batch.to(inputs.device) for batch in batches))
        evaluation = Evaluation(heads, inputs.unigram, None, decode(model, inputs, recipe.validation.decoding))
        tracking.log(0, validation_metrics(heads) | evaluation.metrics())
        for path in write_evaluation(evaluation, output, f"{source}: the heads on held-out text"):
            tracking.artifact(path)
    print_evaluation(out, evaluation)
    say(out, f"saved       {output}/evaluation.json, evaluation.png, metrics.jsonl, recipe.yaml")
    return evaluation


def load_checkpoint(source: str, folder: Path) -> MTPWrapper:
    """Load a model with its heads, in fp32; without saved heads, it gets its next-token head only.

    Raises:
        RecipeError: the saved files do not fit together, or a parameter is not finite.
    """
    with refuse_unloadable("CHECKPOINT", source, "can't be loaded"):
        if (folder / CONFIG_FILE).exists():
            model = MTPWrapper.from_pretrained(folder, dtype=torch.float32)
        else:
            causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
            model = MTPWrapper(causal, 1, heads="none")
    if found := first_not_finite(dict(model.named_parameters())):
        name, value = found
        raise RecipeError(f"CHECKPOINT '{source}' has {value} in its parameter {name}; expected finite numbers")
    return model


def decode(model: MTPWrapper, inputs: Inputs, config: DecodingConfig) -> DecodingResult | None:
    """Decode held-out prompts with the heads drafting; None if no head drafts or the recipe asks for no prompts.

    Prompt and continuation are each cut to half of the model's maximum number of positions.
    """
    if not config.prompts or model.horizon == 1 or not model.heads.drafts:
        return None
    most = getattr(model.causal.config, "max_position_embeddings", None) or config.prompt_tokens + config.new_tokens
    prompt_tokens = min(config.prompt_tokens, most // 2)
    prompts = choose_prompts(inputs.tokens.held_out, config.prompts, prompt_tokens)
    if not prompts:
        say(inputs.console, f"decoding    no held-out document has {prompt_tokens} tokens for a prompt")
        return None
    new_tokens = min(config.new_tokens, most - prompt_tokens)
    model.eval()
    return measure_decoding(model, [prompt.to(inputs.device) for prompt in prompts], new_tokens)
