"""The model's last decoder layer, as heads that are decoder layers use it: how it was called, and what it returned."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Norms that stand beside the decoder layers without being the final norm: BART's of embeddings, Gemma's of per-layer
# inputs.
OTHER_NORMS = ("layernorm_embedding", "per_layer_projection_norm")


@dataclass
class LayerCall:
    """Arguments and output of the model's last decoder layer in one forward."""

    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    output: Tensor | None = None  # [B, S, D]

    @property
    def hidden(self) -> Tensor:  # [B, S, D]
        """The layer's output, before the model's final norm."""
        assert self.output is not None, "the model has not run inside the block that observes its last layer"
        return self.output

    def repeat(self, layer: nn.Module, hidden: Tensor, cache: Any = None) -> Tensor:
        """Call another layer with the same arguments, on other hidden states, with the given cache or without one."""

        def replace_cache(value: Any) -> Any:
            # Architectures differ in the name and the position of the cache argument, so it is found by its type. The
            # model's own cache must not receive the keys of another layer.
            return cache if hasattr(value, "get_seq_length") else value

        options = {name: replace_cache(value) for name, value in self.options.items() if name != "hidden_states"}
        if cache is None and "use_cache" in options:
            options["use_cache"] = False
        return _hidden_states(layer(hidden, *map(replace_cache, self.arguments), **options))


class TrunkPass(NamedTuple):
    """One forward of the trunk, for heads that read more of it than its last hidden state."""

    call: LayerCall
    norm: Callable[[Tensor], Tensor]  # the model's final norm
    tokens: Tensor  # [B, S, D], embeddings of the input tokens
    next_tokens: Tensor | None = None  # [B, n, D], of the tokens after those, where the call has any


def decoder_layers(model: Any) -> tuple[nn.ModuleList, nn.Module]:
    """Return a causal language model's decoder layers and its final norm.

    Raises:
        ValueError: there is no list of as many modules as the configuration has layers.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for parent in model.get_decoder().modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                norms = [
                    module
                    for other, module in parent.named_children()
                    if other not in OTHER_NORMS and other != name and "Norm" in type(module).__name__
                ]
                # A norm of embeddings comes before the final one. BART and some OPT models have no final norm.
                return child, norms[-1] if norms else nn.Identity()
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers; use heads='residual'.")


@contextmanager
def observed(layer: nn.Module) -> Iterator[LayerCall]:
    """Record how a layer is called inside the block; nothing of it stays on the layer."""
    call = LayerCall()

    def before(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        call.arguments, call.options = arguments[1:], dict(options)

    def after(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        call.output = _hidden_states(output)

    if torch.compiler.is_compiling():
        with _forward_replaced(layer, before, after):
            yield call
        return
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        yield call
    finally:
        for hook in hooks:
            hook.remove()


class RotaryCalls:
    """The latest calls of a model's rotary embeddings, so that they can be made again for other positions."""

    def __init__(self) -> None:
        # Models with several kinds of layers call one for each.
        self.latest: deque[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = deque(maxlen=8)

    def at(self, embeddings: Any, index: int, further: int) -> Any:
        """Return rotary embeddings of one position.

        Args:
            embeddings: what one of the calls returned.
            index: a position of that call, by its index.
            further: how many positions beyond it.

        Raises:
            ValueError: none of the calls has returned these.
        """
        for module, arguments, options, output in reversed(self.latest):
            if output is embeddings:

                def moved(x: Any) -> Any:
                    positions = isinstance(x, Tensor) and not x.is_floating_point()
                    return x[..., index : index + 1] + further if positions else x

                return module(*map(moved, arguments), **{name: moved(x) for name, x in options.items()})
        raise ValueError("the model's rotary embeddings are not found among its modules")


@contextmanager
def observed_rotary(model: Any) -> Iterator[RotaryCalls]:
    """Record the calls of a model's rotary embeddings inside the block."""
    calls = RotaryCalls()

    def after(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        calls.latest.append((module, arguments, options, output))

    modules = [module for module in model.get_decoder().modules() if "Rotary" in type(module).__name__]
    hooks = [module.register_forward_hook(after, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _forward_replaced(layer: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
    """Call hooks around a layer's forward, in a form that torch.compile can trace, unlike the registration of hooks."""
    patched, inner = vars(layer).get("forward"), layer.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        before(layer, arguments, options)
        output = inner(*arguments, **options)
        after(layer, arguments, output)
        return output

    layer.forward = forward
    try:
        yield
    finally:
        # torch.compile can't trace `del` of an attribute that was set in the same graph.
        vars(layer).pop("forward", None)
        if patched is not None:  # by a library that wraps the class's own forward
            layer.forward = patched


def _hidden_states(output: Any) -> Tensor:
    # The layers of some architectures return a tuple that begins with the hidden states.
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
