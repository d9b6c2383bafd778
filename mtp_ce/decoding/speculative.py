"""Self-speculative decoding: the heads draft, the model verifies the draft in one forward, the text is the model's own.

    y_0 ~ p(. | prefix)                  head 0 is the model itself: y_0 needs no verification
    y_h ~ q_h(. | prefix)                h = 1..H-1, drafted by head h
    p_h = p(. | prefix, y_0 .. y_{h-1})  all from one forward over y_0 .. y_{H-1}, with the cache of the prefix
    y_h is accepted with probability min(1, p_h(y_h) / q_h(y_h)); the first rejected one is replaced by
    y_h ~ max(0, p_h - q_h), and if all are accepted, y_H ~ p_H follows: either is the next round's y_0

Every token accepted or replaced in this way has the distribution p, whatever q is. Greedy decoding is the case in which
p and q are 0 and 1: a draft is accepted if the model would have chosen it. A round costs one forward of the model and
yields at least one token.

p is the distribution of the model's own `generate`: transformers prepares inputs, logits processors and stopping
criteria from the generation_config, and calls the loop here in place of its own (its argument `custom_generate`).

Source: arXiv:2302.01318, algorithm 2, with drafts from heads as in arXiv:2401.10774.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.cache_utils import DynamicLayer

from mtp_ce.decoding.choice import Choice, Draft
from mtp_ce.decoding.settings import check_followed
from mtp_ce.heads.protocol import ModelWithHeads
from mtp_ce.heads.virtual_tokens import prepare_behind_virtual_tokens, virtual_tokens
from mtp_ce.unembedding import Unembedding

# Inputs that belong to a text's tokens, whichever forward reads those.
TEXT_INPUTS = ("attention_mask", "position_ids", "token_type_ids")


@dataclass
class Speculation:
    """Counts of one decoding. Those of several prompts add up: `sum(counts, Speculation())`.

    In a batch each row that is not finished counts for itself: its forwards, rounds, tokens and drafts.

    Attributes:
        forwards: forwards of the model, that of the prompt included.
        rounds: forwards that verified a draft, or computed the last token: all but the prompt's.
        tokens: new tokens, without padding.
        offered: for each extra head, how often its token was verified: all before it were accepted.
        kept: for each extra head, how often its token was accepted.
    """

    forwards: int = 0
    rounds: int = 0
    tokens: int = 0
    offered: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    def __add__(self, other: Speculation) -> Speculation:
        return Speculation(
            self.forwards + other.forwards,
            self.rounds + other.rounds,
            self.tokens + other.tokens,
            *([one + more for one, more in zip_longest(*counts, fillvalue=0)]
              for counts in ((self.offered, other.offered), (self.kept, other.kept))),
        )  # fmt: skip

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per forward, that of the prompt included; 1 for plain decoding."""
        return self.tokens / max(self.forwards, 1)

    @property
    def acceptance(self) -> list[float]:
        """For each extra head, the fraction of its verified tokens that were accepted; NaN if none was verified."""
        return [kept / offered if offered else math.nan for kept, offered in zip(self.kept, self.offered, strict=True)]

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per round, accepted drafts and the model's own token: tau of arXiv:2401.15077, from 1 to H.

        A batch keeps less where its rows accept unequal numbers of tokens; see `tokens_per_forward`.
        """
        return 1 + sum(self.kept) / max(self.rounds, 1)


class UncroppableCacheError(ValueError):
    """The model's cache can't be cropped before a rejected token, so that it can't verify drafts."""


class SpeculativeOutput(NamedTuple):
    """Tokens, and the counts of their decoding."""

    sequences: Tensor  # [B, S + new], the prompts included
    speculation: Speculation


def generate_speculatively(
    wrapper: ModelWithHeads,
    inputs: Tensor | None = None,  # [B, S]
    generation_config: GenerationConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    horizon: int | None = None,
    **options: Any,
) -> SpeculativeOutput:
    """Decode as the model's own `generate` does, with drafts of the wrapper's heads.

    Args:
        wrapper: an `MTPWrapper` with heads that draft: "residual", "layer" or "sequential", or your own.
        inputs: the prompts, padded on the left where they differ in length; also taken as `input_ids`.
        generation_config: as `generate` takes it; None means the model's own.
        generator: source of random numbers; None means torch's own.
        horizon: 1 + the most tokens of a draft; None means that of the heads. A shared module drafts to any depth,
            other heads to their own at most.
        **options: settings of the generation_config by name, `attention_mask`, `logits_processor`,
            `stopping_criteria`, `prefix_allowed_tokens_fn`, `streamer`, `tokenizer`, with their meaning in `generate`.
            Processors also see prefixes that end in a draft: one that keeps state between calls is not followed.

    Returns:
        The tokens of the model's own greedy decoding, or samples of its distribution, and the counts. A forward over
        several tokens rounds differently from one over a single token: where two tokens tie but for rounding, the text
        may differ from that of `generate`.

    Raises:
        ValueError: heads that can't draft, or not so far, a model whose cache can't be cropped, a setting that can't be
            followed (see `mtp_ce.decoding.settings`), or what `generate` itself refuses.
    """
    heads = wrapper.heads
    if not heads.drafts or heads.horizon == 1:
        raise ValueError(
            f"heads are {heads.kind!r} with horizon {heads.horizon}; speculative decoding needs heads that draft, such "
            "as heads='residual', and a horizon above 1."
        )
    width = heads.horizon if horizon is None else horizon
    if width < 2 or (width > heads.horizon and not heads.shared):
        most = "above 1" if heads.shared else f"from 2 to {heads.horizon}, that of the heads"
        raise ValueError(f"horizon is {width}; expected one {most}.")
    config, arguments = wrapper.causal._prepare_generation_config(generation_config, **options)
    check_followed(config, arguments)
    if not config.use_cache:
        options["use_cache"] = True  # as training often leaves it off; the text is the same
    prompt = options.get("input_ids") if inputs is None else inputs
    if prompt is None or prompt.dim() != 2 or 0 in prompt.shape:
        shape = None if prompt is None else list(prompt.shape)
        raise ValueError(f"input_ids is {shape}; expected prompts of at least one token, [B, S].")
    if config.stop_strings is not None and (tokenizer := options.get("tokenizer")) is not None:
        # transformers passes no tokenizer on to its own criterion where it calls another loop.
        options["stop_strings"], stop = None, StopStringCriteria(tokenizer, config.stop_strings)
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), stop])
    decoding = _Decoding(wrapper, width, generator, options.get("streamer"))
    output: SpeculativeOutput = wrapper.model.generate(
        inputs, generation_config=generation_config, custom_generate=decoding, **options
    )
    return output


class _Decoding:
    """The loop of one decoding, which transformers' `generate` calls in place of its own."""

    def __init__(self, wrapper: ModelWithHeads, horizon: int, generator: torch.Generator | None, streamer: Any) -> None:
        self.wrapper, self.heads, self.generator, self.streamer = wrapper, wrapper.heads, generator, streamer
        self.horizon = horizon
        self.counts = Speculation(offered=[0] * (horizon - 1), kept=[0] * (horizon - 1))

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,  # [B, S]
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> SpeculativeOutput:
        trunk = _Trunk(self.wrapper.model, model, model_kwargs)
        ends = generation_config._eos_token_tensor
        choice = Choice(logits_processor, generation_config.do_sample, ends, self.generator)
        pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        pad = generation_config._pad_token_tensor if pads else None
        text = _Text(input_ids, stopping_criteria, pad, self.streamer)
        output = Unembedding.of(model)
        with self.heads.drafter(model, lambda: _new_cache(model)) as drafter:
            # `begin` is the position at which the last forward began.
            begin, hidden = 0, trunk.run(input_ids, 0, 0)
            _check_croppable(trunk.cache, virtual_tokens(self.wrapper.model) + input_ids.shape[1], model)
            draft, drawn_from = input_ids[:, :0], hidden.new_empty(len(input_ids), 0, output.weight.shape[0])
            while True:
                width, before = draft.shape[1], text.tokens.shape[1]
                logits = output.logits(hidden[:, -1 - width :])
                tokens, accepted = choice.verify(text.tokens, draft, drawn_from, logits, text.active)
                self._count([one for one, counted in zip(accepted, text.counted, strict=True) if counted], width)
                if text.append(tokens):
                    break
                trunk.extend(text.tokens.shape[1] - before)
                # The cache holds every position but the newest token's. What is cropped: the positions of rejected
                # tokens, and those that the next forward repeats.
                cached = text.tokens.shape[1] - 1
                width = max(min(self.horizon - 1, int(generation_config.max_length) - cached - 2), 0)
                draft, drawn_from = draft[:, :0], drawn_from[:, :0]
                if width:  # the last token needs no draft
                    draw = Draft(choice, text.tokens, text.active)
                    with _precision(self.heads, hidden):
                        draft, drawn_from = drafter.draft(
                            hidden, cached - begin - 1, text.tokens[:, begin:], width, draw
                        )
                    draft, drawn_from = draft[:, : draw.length], drawn_from[:, : draw.length]
                end_of_cache = begin + hidden.shape[1]
                begin = max(cached - drafter.repeats, trunk.first)
                _crop([*trunk.cache.layers, *drafter.layers], end_of_cache - begin)
                hidden = trunk.run(torch.cat([text.tokens, draft], 1), begin, draft.shape[1])
        self.counts.tokens = text.count
        return SpeculativeOutput(text.tokens, self.counts)

    def _count(self, accepted: list[int], width: int) -> None:
        counts = self.counts
        counts.rounds += len(accepted) if counts.forwards else 0  # the first forward is the prompt's
        counts.forwards += len(accepted)
        for one in accepted:
            for h in range(min(one + 1, width)):
                counts.offered[h] += 1
                counts.kept[h] += h < one


class _Text:
    """The accepted tokens of a batch, with the end of every row as `generate` decides it."""

    def __init__(self, prompt: Tensor, criteria: Any, pad: Tensor | None, streamer: Any) -> None:
        self.tokens, self.criteria, self.pad, self.streamer = prompt, criteria, pad, streamer
        # Rows without an end, and rows that still get tokens: where no token ends a text, `generate` writes on in
        # finished rows too.
        self.unfinished = torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)
        self.active, self.counted = self.unfinished, [True] * len(prompt)
        self.count = 0

    def append(self, tokens: Tensor) -> bool:  # [B, n]
        """Append tokens one after the other, and return whether all rows are finished: later ones are dropped."""
        for token in tokens.unbind(1):
            if self.pad is not None:
                token = token.where(self.active, self.pad.to(token.device))
            self.count += sum(self.counted)
            self.tokens = torch.cat([self.tokens, token[:, None]], 1)
            self.unfinished = self.unfinished & ~self.criteria(self.tokens, None)
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            unfinished = self.unfinished.tolist()
            if self.pad is not None:
                self.active, self.counted = self.unfinished, unfinished
            if not any(unfinished):
                if self.streamer is not None:
                    self.streamer.end()
                return True
        return False


class _Trunk:
    """Forwards of the base model, with the inputs that the model prepares for its own `generate`.

    Attributes:
        cache: the cache of all positions so far.
        first: the first position that a later forward may repeat. Images and the like are read with the prompt alone.
    """

    def __init__(self, model: Any, causal: Any, kwargs: dict[str, Any]) -> None:
        self.model, self.causal, self.kwargs = model, causal, kwargs
        self.output: Any = None
        self.cache = _cache_of(kwargs, causal)
        self.first = 0

    def run(
        self, tokens: Tensor, begin: int, drafted: int
    ) -> Tensor:  # [B, L + drafted] -> [B, L + drafted - begin, D]
        """Return the last hidden states of the tokens from `begin` on; those before are in the cache."""
        kwargs = self._extended(drafted)
        if self.output is None:
            # PEFT's prompt learning puts its virtual tokens before these.
            inputs = self.causal.prepare_inputs_for_generation(tokens, is_first_iteration=True, **kwargs)
            self.cache = _cache_of(inputs, self.causal)
            _record_past(self.cache)
            others = (value for name, value in kwargs.items() if name not in TEXT_INPUTS)
            if not all(value is None or isinstance(value, int | Cache) for value in others):
                self.first = tokens.shape[1]
        else:
            kwargs["next_sequence_length"] = tokens.shape[1] - begin
            inputs = prepare_behind_virtual_tokens(self.model, tokens, is_first_iteration=False, **kwargs)
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", "logits_to_keep")}
        self.output = self.causal.base_model(**inputs, return_dict=True)
        hidden: Tensor = self.output.last_hidden_state[:, begin - tokens.shape[1] :]
        return hidden

    def extend(self, count: int) -> None:
        """Extend mask and positions by as many accepted tokens."""
        self.kwargs = self._extended(count)

    def _extended(self, count: int) -> dict[str, Any]:
        if not count:
            return dict(self.kwargs)
        extended: dict[str, Any] = self.causal._update_model_kwargs_for_generation(
            self.output, dict(self.kwargs), num_new_tokens=count
        )
        return extended


def _precision(heads: torch.nn.Module, hidden: Tensor) -> AbstractContextManager[Any]:
    """Return an autocast for heads of another dtype than the trunk's, as in mixed-precision training."""
    own = next((parameter.dtype for parameter in heads.parameters()), hidden.dtype)
    half = own if hidden.dtype == torch.float32 else hidden.dtype
    return torch.autocast(hidden.device.type, dtype=half, enabled=own != hidden.dtype)


def _new_cache(causal: Any) -> DynamicCache:
    cache = DynamicCache(config=causal.config)
    _record_past(cache)
    return cache


def _cache_of(inputs: dict[str, Any], causal: Any) -> Cache:
    """Return the cache among the inputs of a model, whatever its name there."""
    cache = next((value for value in inputs.values() if isinstance(value, Cache)), None)
    if cache is None:
        raise _uncroppable(causal)
    return cache


def _record_past(cache: Cache) -> None:
    # A sliding window then keeps the positions that rejected tokens push out of it, until it is cropped.
    getattr(cache, "activate_past_recording", lambda: None)()


def _crop(layers: list[Any], positions: int) -> None:
    for layer in layers:
        # A layer that records its past has to be told also that nothing was rejected. One that holds nothing yet is
        # skipped: transformers before 5.22 fails to crop it.
        if getattr(layer, "is_initialized", True) and (positions or getattr(layer, "record_past", False)):
            layer.crop(-positions)


def _check_croppable(cache: Cache, length: int, causal: Any) -> None:
    """Refuse a model whose state can't be rolled back: by the type of its cache, or because it has not used it."""
    croppable = (getattr(layer, "is_croppable", type(layer) is DynamicLayer) for layer in cache.layers)
    if not all(croppable) or cache.get_seq_length() != length:
        raise _uncroppable(causal)


def _uncroppable(causal: Any) -> UncroppableCacheError:
    return UncroppableCacheError(
        f"model is {type(causal).__name__}, whose cache transformers {transformers.__version__} can't crop before a "
        "rejected token; generate without speculative=True."
    )
