"""One decoder layer at every depth of a draft, in training over all positions at once and in decoding token by token.

Engines draft with one MTP module as with a language model of one layer (vLLM, SGLang). Its cache holds the accepted
positions, where it has read the trunk's hidden state. A draft after position t is at position t + 1, t + 2, ..., and
attends to the accepted positions and to the drafts before it:

    key of               0  1 .. t        accepted, depth 1: (hidden_0(j), token j + 1)
                         t+1 .. t+h-1     drafts, depth k = 2 .. h: (hidden_{k-1}(t), token t + k)
    query of depth h     position t + h - 1

Training computes this for every t. Depth h is one call of the layer over h rows of S positions, the inputs of depths 1
to h, with a mask: position (t, h) attends to (j, 1) for j as in the model's own mask, and to (t, 2) .. (t, h). The
depths before are computed again for their keys and values, which needs no cache with gradients and works with
activation checkpoints.

Source: arXiv:2503.01840, section 3.2 (training-time test); arXiv:2509.18362 (one module for all depths).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtp_ce.heads.trunk import LayerCall, RotaryCalls

# Arguments of a decoder layer that depend on positions; all have S as their last dimension but one or their last.
_POSITIONS = ("position_embeddings", "position_ids", "cache_position")


def repeat_at_depth(call: LayerCall, layer: nn.Module, inputs: Sequence[Tensor]) -> Tensor:  # [B, S, D], each
    """Return a layer's output [B, S, D] at the last of several depths.

    Args:
        call: the call of the model's last layer in this forward.
        layer: the shared layer.
        inputs: its inputs at depths 1 .. h.

    Raises:
        ValueError: attention does not take a mask, or the layer has an argument that can't be repeated.
    """
    depths, S = len(inputs), inputs[0].shape[1]
    options = _named(call, layer)
    other = [
        name for name, x in options.items() if isinstance(x, Tensor) and name not in (*_POSITIONS, "attention_mask")
    ]
    if other:
        raise ValueError(f"{type(layer).__name__} takes {other[0]}, which can't be repeated for several depths.")
    mask = _mask(options.get("attention_mask"), S, inputs[0])
    # Past the end of a row there is no target, so that its last position may stand for all of those.
    index = torch.cat([(torch.arange(S, device=mask.device) + k).clamp(max=S - 1) for k in range(depths)])
    for name in _POSITIONS:
        if options.get(name) is not None:
            options[name] = _select(options[name], index, name)
    options["attention_mask"] = _over_depths(mask, depths)
    repeated = LayerCall((), options)
    return repeated.repeat(layer, torch.cat(list(inputs), 1))[:, -S:]


class Drafts:
    """A layer's calls in decoding: over the accepted positions, which stay in the cache, then over drafts.

    Args:
        call: follows the model's last layer.
        rotary: follows its rotary embeddings.
        cache: an empty one; its last layer is filled.
    """

    def __init__(self, call: LayerCall, rotary: RotaryCalls, cache: Any) -> None:
        self.call, self.rotary, self.cache = call, rotary, cache
        self.last = 0
        self.mask: Tensor | None = None
        self.past: tuple[Tensor, Tensor] | None = None

    def first(self, layer: nn.Module, x: Tensor, last: int) -> Tensor:  # [B, L, D] -> [B, 1, D]
        """Run the layer over the positions of the model's forward, and return the output at the last accepted one."""
        seen = _Seen(self.cache)
        z = self.call.repeat(layer, x, seen)
        rejected = x.shape[1] - last - 1
        keys, values = seen.read
        kept = keys.shape[-2] - rejected
        self.last, self.past = last, (keys[..., :kept, :], values[..., :kept, :])
        mask = _named(self.call, layer).get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            raise _no_mask(type(mask).__name__)
        self.mask = None if mask is None else mask[:, :, last : last + 1, :kept]
        return z[:, last : last + 1]

    def further(self, layer: nn.Module, x: Tensor, h: int) -> Tensor:  # [B, 1, D], both
        """Run the layer over the draft at depth h, which attends to the accepted positions and the drafts before."""
        assert self.past is not None
        seen = _Seen(past=self.past)
        options = {**_named(self.call, layer), **draft_positions(self.call, self.rotary, self.last, h - 1)}
        if self.mask is not None:
            open_to = torch.ones_like if self.mask.dtype == torch.bool else torch.zeros_like
            self.mask = torch.cat([self.mask, open_to(self.mask[..., :1])], -1)
            options["attention_mask"] = self.mask
        z = LayerCall((), options).repeat(layer, x, seen)
        self.past = seen.read
        return z


class _Seen:
    """A cache in one call of a layer, which remembers the keys and values that attention read."""

    def __init__(self, cache: Any = None, past: tuple[Tensor, Tensor] | None = None) -> None:
        self.cache, self.past = cache, past
        self.read: tuple[Tensor, Tensor] = past if past is not None else (torch.empty(0), torch.empty(0))

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all of them."""
        if self.cache is not None:
            self.read = self.cache.update(keys, values, *arguments, **options)
        elif self.past is not None:
            self.read = (torch.cat([self.past[0], keys], -2), torch.cat([self.past[1], values], -2))
        return self.read

    def get_seq_length(self, *arguments: Any) -> int:
        """Return the number of positions before this call."""
        if self.past is not None:
            return self.past[0].shape[-2]
        return int(self.cache.get_seq_length(*arguments))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


def draft_positions(call: LayerCall, rotary: RotaryCalls, last: int, further: int) -> dict[str, Any]:
    """Return the layer's arguments for a position beyond an accepted one.

    Args:
        call: the call of the model's last layer in this forward.
        rotary: the calls of its rotary embeddings.
        last: index of the accepted position in this forward.
        further: how many positions beyond it.

    Raises:
        ValueError: the rotary embeddings of the layer are not found.
    """
    positions: dict[str, Any] = {}
    for name in ("position_ids", "cache_position"):
        if isinstance(x := call.options.get(name), Tensor):
            positions[name] = x[..., last : last + 1] + further
    if (embeddings := call.options.get("position_embeddings")) is not None:
        positions["position_embeddings"] = rotary.at(embeddings, last, further)
    return positions


def _named(call: LayerCall, layer: nn.Module) -> dict[str, Any]:
    """Return all arguments of the call but the hidden states, by name."""
    if not call.arguments:
        return dict(call.options)
    names = list(inspect.signature(layer.forward).parameters)[1:]
    return {**dict(zip(names, call.arguments, strict=False)), **call.options}


def _select(x: Any, index: Tensor, name: str) -> Any:
    if isinstance(x, tuple):  # cosines and sines
        return tuple(_select(one, index, name) for one in x)
    return x.index_select(-2 if name == "position_embeddings" else -1, index.to(x.device))


def takes_masks(config: Any) -> bool:
    """Return whether a model's attention takes any mask [B, 1, S, S]."""
    return getattr(config, "_attn_implementation", None) in ("sdpa", "eager", None)


def check_takes_masks(config: Any) -> None:
    """Check that a model's attention takes the mask of several depths.

    Raises:
        ValueError: it does not.
    """
    if not takes_masks(config):
        raise _no_mask(config._attn_implementation)


def _mask(mask: Any, S: int, like: Tensor) -> Tensor:
    """Return the model's own mask [B, 1, S, S], also where attention is causal without one."""
    if mask is None:
        return torch.ones(S, S, dtype=torch.bool, device=like.device).tril()[None, None]
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise _no_mask(type(mask).__name__)
    return mask


def _over_depths(mask: Tensor, depths: int) -> Tensor:  # [B, 1, S, S] -> [B, 1, hS, hS]
    """Return the mask of the module's comment."""
    eye = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    if mask.dtype == torch.bool:
        closed = torch.zeros_like(eye)
    else:
        closed = torch.full_like(mask[0, 0], torch.finfo(mask.dtype).min)
        eye = closed.masked_fill(eye, 0)
    eye, closed = eye.expand_as(mask), closed.expand_as(mask)
    rows = [torch.cat([mask, *[eye] * k, *[closed] * (depths - 1 - k)], -1) for k in range(depths)]
    return torch.cat(rows, -2)


def _no_mask(found: str) -> ValueError:
    return ValueError(
        f"model has attention {found!r}, and one module for several depths needs one that takes a mask [B, 1, S, S]; "
        "expected attn_implementation='sdpa' or 'eager', shared=False, or a horizon of 2."
    )
