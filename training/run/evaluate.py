"""Evaluate a checkpoint on held-out text, as a training does at its end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mtp_ce.decoding.speculative import UncroppableCacheError
from mtp_ce.heads.kinds import CONFIG_FILE
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.serving.carried import CarriedModule
from mtp_ce.training.config.schema import EvaluationRecipe
from mtp_ce.training.config.validation import DecodingConfig
from mtp_ce.training.console import say, warn
from mtp_ce.training.data.corpus import domains_of
from mtp_ce.training.data.prompts import Prompt, PromptLine, encode_prompts
from mtp_ce.training.errors import RecipeError, refuse_unloadable
from mtp_ce.training.interrupt import ignore_sigterm
from mtp_ce.training.loop.finite import first_not_finite
from mtp_ce.training.metrics.acceptance import Acceptance, AcceptanceResult, check_draft_tokens, measure_acceptance
from mtp_ce.training.metrics.decoding import DecodingResult, choose_prompts, measure_decoding
from mtp_ce.training.metrics.evaluation import Evaluation
from mtp_ce.training.metrics.head_scores import score_heads, validation_metrics
from mtp_ce.training.report.evaluation import print_evaluation, write_evaluation
from mtp_ce.training.run.folder import make_folder
from mtp_ce.training.run.inputs import Inputs, read_held_out
from mtp_ce.training.tracking.composite import Tracking


def evaluate(
    source: str,
    recipe: EvaluationRecipe,
    output: Path,
    out: Console | None = None,
    prompts: Sequence[PromptLine] | None = None,
) -> Evaluation:
    """Measure a checkpoint's heads on held-out text and in decoding; write evaluation.json and evaluation.png.

    Args:
        source: the checkpoint, named as in recipes. Without saved heads and MTP modules of its own, only its next-token
            head is measured.
        recipe: the text, how much of it, and tracking.
        output: folder to create; it must not exist.
        out: where to print; None means the terminal.
        prompts: what to decode; None means passages of the held-out text.

    Raises:
        RecipeError: the checkpoint, the corpus, a prompt or the output folder is missing or invalid.
    """
    transformers_logging.disable_progress_bar()
    out = out or Console()
    inputs = read_held_out(recipe, source, out)
    encoded = None if prompts is None else encode_prompts(prompts, inputs.tokenizer, inputs.vocab_size)
    model = load_checkpoint(source, inputs.model_folders["CHECKPOINT"], out)
    check_drafts(model, recipe.validation.decoding, encoded)
    # transformers wraps its own `to` in a way that hides `self` from type checkers.
    nn.Module.to(model, inputs.device).eval()
    say(out, f"model       {model.horizon} heads, {model.kind}; on {inputs.device}")
    make_folder(output, recipe)
    with Tracking(recipe, output, partial(warn, out), on_error=ignore_sigterm) as tracking:
        tracking.tags({"checkpoint": source})
        rows = inputs.rows(inputs.tokens.held_out)
        batches = rows.in_order(recipe.validation.batch_size, recipe.validation.rows)
        heads = score_heads(model, (batch.to(inputs.device) for batch in batches))
        decoding, acceptance = decode(model, inputs, recipe.validation.decoding, encoded)
        evaluation = Evaluation(heads, inputs.unigram, None, decoding, acceptance)
        tracking.log(0, validation_metrics(heads) | evaluation.metrics())
        for path in write_evaluation(evaluation, output, f"{source}: the heads on held-out text"):
            tracking.artifact(path)
    print_evaluation(out, evaluation)
    say(out, f"saved       {output}/evaluation.json, evaluation.png, metrics.jsonl, recipe.yaml")
    return evaluation


def load_checkpoint(source: str, folder: Path, out: Console | None = None) -> MTPWrapper:
    """Load a model with its heads, in fp32: saved ones, or else MTP modules of its own; or its next-token head only.

    Args:
        source: the checkpoint, for messages.
        folder: of its files.
        out: where to print why modules are not measured; None means nowhere.

    Raises:
        RecipeError: the saved files do not fit together, or a parameter is not finite.
    """
    with refuse_unloadable("CHECKPOINT", source, "can't be loaded"):
        if (folder / CONFIG_FILE).exists():
            model = MTPWrapper.from_pretrained(folder, dtype=torch.float32)
        else:
            causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
            native = _native(folder, out) if CarriedModule.of(causal).names else None
            model = MTPWrapper(causal, 1, heads="none") if native is None else native
    if found := first_not_finite(dict(model.named_parameters())):
        name, value = found
        raise RecipeError(f"CHECKPOINT '{source}' has {value} in its parameter {name}; expected finite numbers")
    return model


def _native(folder: Path, out: Console | None) -> MTPWrapper | None:
    try:
        return MTPWrapper.from_pretrained(folder, heads="native", dtype=torch.float32)
    except ValueError as error:
        if out is not None:
            warn(out, f"the MTP module of CHECKPOINT is not measured: {error}")
        return None


def check_drafts(model: MTPWrapper, config: DecodingConfig, prompts: Sequence[Prompt] | None) -> None:
    """Check that the heads can draft as far, and the model read as much, as was asked for.

    Raises:
        RecipeError: they can't.
    """
    asked = "--prompts" if prompts else "validation.decoding.draft_tokens" if config.draft_tokens else ""
    if asked and (model.horizon == 1 or not model.heads.drafts):
        raise RecipeError(f"{asked} needs heads that draft; CHECKPOINT has {model.horizon} heads, {model.kind!r}")
    if not asked:
        return
    try:
        K = check_draft_tokens(model, config.draft_tokens)
    except ValueError as error:
        raise RecipeError(f"validation.decoding.{error}") from None
    most = _positions(model)
    for prompt in prompts or ():
        if most is not None and len(prompt.tokens) + config.new_tokens + K - 1 > most:
            raise RecipeError(
                f"{prompt.where}: {len(prompt.tokens)} tokens of a prompt, {config.new_tokens} new ones "
                f"(validation.decoding.new_tokens) and {K - 1} more of the last draft are more than the model's {most} "
                "positions"
            )


class Decoded(NamedTuple):
    """What prompts came to, decoded with drafts and as an engine counts them; None where that is not possible."""

    decoding: DecodingResult | None
    acceptance: AcceptanceResult | None


def decode(
    model: MTPWrapper, inputs: Inputs, config: DecodingConfig, prompts: Sequence[Prompt] | None = None
) -> Decoded:
    """Decode prompts with the heads drafting; nothing if no head drafts or the recipe asks for no prompts.

    Args:
        model: the model.
        inputs: the held-out text, the device and the console.
        config: how many prompts and tokens.
        prompts: what to decode; None means passages of the held-out text, of at most half of the model's positions.
    """
    if model.horizon == 1 or not model.heads.drafts or not (config.prompts or prompts):
        return Decoded(None, None)
    most = _positions(model)
    new_tokens = config.new_tokens
    if prompts is None:
        prompt_tokens = config.prompt_tokens if most is None else min(config.prompt_tokens, most // 2)
        prompts = _held_out_prompts(inputs, config.prompts, prompt_tokens)
        if not prompts:
            say(inputs.console, f"decoding    no held-out document has {prompt_tokens} tokens for a prompt")
            return Decoded(None, None)
        new_tokens = new_tokens if most is None else min(new_tokens, most - prompt_tokens)
    model.eval()
    result, texts = None, None
    try:
        rows = [torch.tensor([prompt.tokens], device=inputs.device) for prompt in prompts]
        result, texts = measure_decoding(model, rows, new_tokens)
    except UncroppableCacheError as error:
        say(inputs.console, f"decoding    none: {error}")
    K = check_draft_tokens(model, config.draft_tokens)
    # An engine verifies the last draft whole, also beyond the end of the text.
    counted = new_tokens if most is None else min(new_tokens, most - max(len(p.tokens) for p in prompts) - (K - 1))
    if counted < 1:
        return Decoded(result, None)
    tokens = [prompt.tokens for prompt in prompts]
    counts = measure_acceptance(model, tokens, counted, config.draft_tokens, texts=texts)
    domains: dict[str, Acceptance] = {}
    for prompt, one in zip(prompts, counts, strict=True):
        domains[prompt.domain] = domains.get(prompt.domain, Acceptance()) + one
    return Decoded(result, AcceptanceResult(K, dict(sorted(domains.items()))))


def _positions(model: MTPWrapper) -> int | None:
    return getattr(model.causal.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _held_out_prompts(inputs: Inputs, count: int, tokens: int) -> list[Prompt]:
    chosen = choose_prompts(inputs.tokens.held_out, count, tokens)
    domains = domains_of([inputs.corpus.held_out[index] for index, _ in chosen])
    return [Prompt(passage, domain) for (_, passage), domain in zip(chosen, domains, strict=True)]
