"""Train the critic of critic_delta: a value at every token that predicts whether the function will compile.

    V = score(trunk(ids))               [R, T]          a value head of width 1 on a random or trained trunk

Training data are the functions of the training files, intact and corrupted; Python's compiler decides the reward. The
losses are in training/critic/loss.py. The critic is an ordinary transformers model for token classification with one
label.

Most corruptions leave a function valid, so a corruption is drawn again until one breaks it. About half of the training
functions then compile, and the values of regression are probabilities under that ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mtp_ce.training.config.model import PretrainedModelConfig, TrunkConfig
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.critic.functions import Corruption, Pair, PairRows, encode_functions, find_functions, make_pair
from mtp_ce.training.critic.loss import OBJECTIVES, PairSums, score_pairs
from mtp_ce.training.data.corpus import Corpus
from mtp_ce.training.data.rows import rows_of_step
from mtp_ce.training.errors import RecipeError, StateRefusedError, StepRefusedError, StoppedError, refuse_unloadable
from mtp_ce.training.interrupt import Stop
from mtp_ce.training.models.build import llama_config
from mtp_ce.training.models.optimizer import build_optimizer, build_schedule

# Pairs of each held-out function: a corpus of a few hundred files holds out few functions.
_HELD_OUT_PAIRS = 4

# Maximum number of draws; a function that all of them leave valid is trained on as it is.
_DRAWS = 8


def build_critic(recipe: Recipe, end_of_text: int, pretrained: Path | None = None) -> PreTrainedModel:
    """Build a critic with values 0, on the default device; a random trunk comes from torch's global seed.

    Args:
        recipe: sizes come from `recipe.critic.model` or `recipe.model`, the vocabulary and the longest row from
            `recipe.data`.
        end_of_text: token id that opens and closes a function.
        pretrained: folder of the model that the trunk starts from, if `recipe.model` is pretrained and
            `recipe.critic` has no sizes of its own.
    """
    sizes = recipe.critic.model if recipe.critic and recipe.critic.model else recipe.model
    if not isinstance(sizes, PretrainedModelConfig):
        return _critic_of(sizes, recipe, end_of_text, pretrained)
    with refuse_unloadable("model.source", sizes.source):
        return _critic_of(sizes, recipe, end_of_text, pretrained)


def _critic_of(
    sizes: TrunkConfig | PretrainedModelConfig, recipe: Recipe, end_of_text: int, pretrained: Path | None
) -> PreTrainedModel:
    config: Any
    if isinstance(sizes, PretrainedModelConfig):
        assert pretrained is not None
        config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
    else:
        config = llama_config(sizes, recipe.data, end_of_text)
    config.num_labels = 1
    # transformers' default is a dropout of 0.1 before the value head.
    config.classifier_dropout = 0.0
    # The scorer reads packed rows, and transformers separates their documents only without a cache.
    config.use_cache = False
    critic: PreTrainedModel
    if isinstance(sizes, PretrainedModelConfig) and pretrained:
        critic = AutoModelForTokenClassification.from_pretrained(
            pretrained, config=config, dtype=torch.float32, trust_remote_code=False
        )
    else:
        critic = LlamaForTokenClassification(config)
    # Zero initial values: random ones differ by far more than the rewards do, and regression would spend its first
    # steps on removing that.
    for head in critic.children():
        if isinstance(head, nn.Linear):
            nn.init.zeros_(head.weight)
    return critic


def train_critic(
    recipe: Recipe,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    *,
    pretrained: Path | None = None,
    log: Callable[[int, dict[str, float]], None],
    tick: Callable[[], None] = lambda: None,
    stop: Stop | None = None,
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Train a critic on the functions of the corpus, and validate it on those of the held-out files.

    Args:
        recipe: `recipe.critic` has the settings; its seed decides initial weights, order and corruptions.
        corpus: source of the functions.
        tokenizer: a fast one; it has an end-of-text token.
        device: device of the critic.
        pretrained: see `build_critic`.
        log: receives metrics by name: critic/loss and critic/accuracy over the steps since the last line, optim/lr
            and optim/grad_norm (before clipping) of the last step.
        tick: called after every step.
        stop: set from outside; the loop ends with StoppedError before the next step.

    Returns:
        The critic in eval mode, and the validation metrics critic/val_loss and critic/val_accuracy.

    Raises:
        RecipeError: the corpus has too few functions.
        StepRefusedError: loss or gradient was not finite; the step was not taken.
        StateRefusedError: the validation is not finite.
        StoppedError: `stop` was set.
    """
    stop = stop or Stop()
    config = recipe.critic
    assert config is not None
    assert config.train is not None
    train, objective = config.train, OBJECTIVES[config.objective]
    functions, held_out = _functions(recipe, corpus, tokenizer)
    optimizer_config = config.optimizer or recipe.optimizer
    clip_norm = math.inf if optimizer_config.clip_norm is None else optimizer_config.clip_norm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        critic = build_critic(recipe, tokenizer.eos_token_id, pretrained)
    # transformers wraps its own `to` in a way that hides `self` from type checkers.
    critic = nn.Module.to(critic, device)
    optimizer = build_optimizer(critic, optimizer_config)
    schedule = build_schedule(optimizer, optimizer_config, train.steps)
    generator = torch.Generator().manual_seed(config.seed)

    def micro_batches(pairs: Sequence[Pair]) -> list[PairRows]:
        size = train.micro_batch_size or train.batch_size
        starts = range(0, len(pairs), size)
        return [PairRows.of(pairs[start : start + size], tokenizer.eos_token_id, device) for start in starts]

    critic.train()
    window = _Window()
    try:
        for step in range(1, train.steps + 1):
            stop.check()
            chosen = rows_of_step(step - 1, train.batch_size, len(functions), config.seed).tolist()
            pairs = [_broken_pair(functions[i], config.corruption, tokenizer, generator) for i in chosen]
            # Functions of similar length share a micro-batch, which needs less padding.
            pairs.sort(key=lambda pair: len(pair.intact))
            optimizer.zero_grad(set_to_none=True)
            sums = score_pairs(critic, micro_batches(pairs), objective)
            norm = float(clip_grad_norm_(critic.parameters(), clip_norm))
            _gate(step, sums.loss, norm)
            optimizer.step()
            window.add(step, sums, {"optim/lr": float(schedule.get_last_lr()[0]), "optim/grad_norm": norm})
            schedule.step()
            tick()
            if step in (1, train.steps) or step % train.log_every == 0:
                log(step, window.metrics())
                window = _Window()
    except (StepRefusedError, StoppedError):
        # Log the steps taken since the last line of metrics.
        if window.step:
            log(window.step, window.metrics())
        raise

    critic.eval()
    sums = PairSums()
    with torch.no_grad():
        for rows in micro_batches(held_out):
            stop.check()
            sums += score_pairs(critic, [rows], objective)
    results = sums.metrics("critic/val_")
    if not math.isfinite(loss := results["critic/val_loss"]):
        raise StateRefusedError(train.steps, "critic/val_loss", loss)
    log(train.steps, results)
    return critic, results


def _functions(
    recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[list[int]], list[Pair]]:
    """Return the training functions, and held-out pairs sorted by length that are equal for every seed."""
    config = recipe.critic
    assert config is not None
    assert config.train is not None
    longest = recipe.data.sequence_length
    sources = find_functions(corpus.train)
    known = set(sources)
    functions = encode_functions(sources, tokenizer, longest)
    new = [source for source in find_functions(corpus.held_out) if source not in known]
    generator = torch.Generator().manual_seed(0)
    pairs = [
        _broken_pair(ids, config.corruption, tokenizer, generator)
        for ids in encode_functions(new, tokenizer, longest)
        for _ in range(_HELD_OUT_PAIRS)
    ]
    broken = sum(pair.differs for pair in pairs)
    if len(functions) < config.train.batch_size or not broken:
        raise RecipeError(
            f"the critic has {len(functions)} functions of at most {longest - 2} tokens to train on and "
            f"{broken} broken ones to validate on; it needs critic.train.batch_size "
            f"{config.train.batch_size} and 1: raise data.sequence_length or data.holdout_fraction, take more "
            "Python files as data.corpus, or give a trained critic as critic.source"
        )
    return functions, sorted(pairs, key=lambda pair: len(pair.intact))


def _broken_pair(
    ids: list[int], corruption: Corruption, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator
) -> Pair:
    for _ in range(_DRAWS):
        pair = make_pair(ids, corruption, tokenizer, generator)
        if pair.differs:
            break
    return pair


def _gate(step: int, loss: float, norm: float) -> None:
    for quantity, value in (("critic/loss", loss), ("optim/grad_norm", norm)):
        if not math.isfinite(value):
            raise StepRefusedError(step, quantity, value)


@dataclass
class _Window:
    """The steps since the last line of metrics."""

    step: int = 0
    sums: PairSums = field(default_factory=PairSums)
    last: dict[str, float] = field(default_factory=dict)

    def add(self, step: int, sums: PairSums, last: dict[str, float]) -> None:
        self.step, self.sums, self.last = step, self.sums + sums, last

    def metrics(self) -> dict[str, float]:
        return self.sums.metrics("critic/") | self.last
