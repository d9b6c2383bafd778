"""Self-speculative decoding: the heads draft, the model checks all of it in one forward, the text stays the model's.

    y_0 ~ p(. | prefix)                  head 0 is the model itself: y_0 needs no check
    y_h ~ q_h(. | prefix)                h = 1..H-1, drafted by head h from the same hidden state
    p_h = p(. | prefix, y_0 .. y_{h-1})  all from one forward over y_0 .. y_{H-1}, with the cache of the prefix
    y_h is kept with probability min(1, p_h(y_h) / q_h(y_h)); at the first that is not, y_h ~ max(0, p_h - q_h) instead,
    and the round ends

Every token kept or replaced so has the distribution p, whatever q is. Greedy decoding is the case in which p and q are
0 and 1: what is kept is what the model would have chosen. A round costs one forward and gives at least one token.

Source: arXiv:2302.01318, algorithm 2, with drafts from heads as in arXiv:2401.10774.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mtp_ce.unembedding import Unembedding

if TYPE_CHECKING:
    from mtp_ce.wrapper import MTPWrapper

# Takes logits [N, V], gives probabilities [N, V].
Distribution = Callable[[Tensor], Tensor]


@dataclass
class Speculation:
    """How well the heads drafted.

    Attributes:
        forwards: forwards of the model, that of the prompt included.
        tokens: new tokens.
        offered: for each extra head, how often its token was looked at: all before it were kept.
        kept: for each extra head, how often it was kept.
    """

    forwards: int = 0
    tokens: int = 0
    offered: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per forward; plain decoding gives 1."""
        return self.tokens / max(self.forwards, 1)

    @property
    def acceptance(self) -> list[float]:
        """For each extra head, the share of its tokens that were kept, of those looked at."""
        return [kept / max(offered, 1) for kept, offered in zip(self.kept, self.offered, strict=True)]


class SpeculativeOutput(NamedTuple):
    """Tokens and how they came about."""

    sequences: Tensor  # [1, S + new], the prompt included
    speculation: Speculation


@torch.no_grad()
def generate_speculatively(
    wrapper: MTPWrapper,
    input_ids: Tensor,  # [1, S]
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    generator: torch.Generator | None = None,
) -> SpeculativeOutput:
    """Decode with drafts of the wrapper's heads.

    Args:
        wrapper: its heads are of the kind "residual", whose drafts need nothing but the last hidden state.
        input_ids: one prompt, not padded.
        max_new_tokens: new tokens at most.
        do_sample: whether to sample; else greedy.
        temperature: of sampling, above 0.
        top_k: sample among so many; None means all.
        top_p: sample among the likeliest that have this much probability; None means all.
        eos_token_id: decoding ends with it; None takes the model's own generation settings.
        generator: where samples come from; None means torch's own.

    Returns:
        The tokens that the model alone would give (greedy), or of its distribution (sampling), and statistics.

    Raises:
        ValueError: more than one prompt, heads that can't draft, or a setting out of its range.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids is {list(input_ids.shape)}; expected one prompt, [1, S].")
    if wrapper.kind != "residual" or wrapper.horizon == 1:
        raise ValueError(
            f"heads are {wrapper.kind!r} with horizon {wrapper.horizon}; speculative decoding needs 'residual' heads "
            "and a horizon above 1."
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    distribution = _sampled(temperature, top_k, top_p) if do_sample else _greedy
    causal, H = wrapper.causal, wrapper.horizon
    output, base = Unembedding.of(causal), causal.base_model
    ends = _ends(eos_token_id, causal)
    cache = DynamicCache(config=causal.config)
    found = Speculation(forwards=1, offered=[0] * (H - 1), kept=[0] * (H - 1))
    new: list[int] = []

    hidden = base(input_ids=input_ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    replaced: Tensor | None = None  # what a rejected token became: drawn already
    while len(new) < max_new_tokens and not (new and new[-1] in ends):
        heads = wrapper.heads(hidden)[: max_new_tokens - len(new)]
        q = torch.cat([distribution(output.logits(head[:, -1])) for head in heads])  # [h, V]
        draft = _draw(q, generator)
        if replaced is not None:
            draft[0] = replaced
        if len(draft) == 1:  # the last token needs no check
            new += draft.tolist()
            break
        checked = base(input_ids=draft[None], past_key_values=cache, use_cache=True).last_hidden_state
        found.forwards += 1
        p = distribution(output.logits(checked[0, :-1]))  # [h - 1, V], of the drafts after the first
        chance = p.gather(1, draft[1:, None]) / q[1:].gather(1, draft[1:, None])
        luck = torch.rand(chance.shape, device=chance.device, generator=generator)
        verdict = (luck < chance)[:, 0].tolist()
        count = next((i for i, kept in enumerate(verdict) if not kept), len(verdict))
        for h in range(min(count + 1, len(verdict))):
            found.offered[h] += 1
            found.kept[h] += h < count
        replaced = None
        if count < len(verdict):
            rest = (p[count] - q[count + 1]).clamp(min=0)
            replaced = _draw((rest / rest.sum())[None], generator)[0]
        kept = draft[: count + 1].tolist()
        end = next((i for i, token in enumerate(kept) if token in ends), None)
        new += kept if end is None else kept[: end + 1]
        # The cache holds the whole draft; what was not kept has to go.
        if rejected := len(draft) - count - 1:
            cache.crop(-rejected)
        hidden = checked[:, count : count + 1]
    found.tokens = len(new)
    return SpeculativeOutput(torch.cat([input_ids, input_ids.new_tensor([new])], 1), found)


def _greedy(logits: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()


def _sampled(temperature: float, top_k: int | None, top_p: float | None) -> Distribution:
    steps: list[Any] = [TemperatureLogitsWarper(float(temperature))]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else []

    def distribution(logits: Tensor) -> Tensor:
        logits = logits.float()
        for step in steps:
            logits = step(None, logits)
        return logits.softmax(-1)

    return distribution


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:  # [N, V]
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _ends(given: int | list[int] | None, causal: Any) -> set[int]:
    ends = causal.generation_config.eos_token_id if given is None else given
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
