"""How a causal language model turns hidden states into logits, where that is more than one matrix product.

logits = softcap( (scale * hidden) W^T + bias )         softcap(x) = c tanh(x / c)

Architectures name scale and softcap each in their own way, and some have more: a layer between the base model and the
output layer. What the configuration says is therefore held to the model's own logits, once, by `Unembedding.checked`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Gemma, NanoChat, Inkling 2; RecurrentGemma; xLSTM.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Cohere; Falcon-H1.
FACTORS = ("logit_scale", "lm_head_multiplier")
# Granite, MiniCPM3; Inkling.
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")


class Unembedding(NamedTuple):
    """The output layer of a causal language model, as the linear path of the loss takes it."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: nn.Module) -> Unembedding:
        """Read it from a Hugging Face model.

        Args:
            model: has `get_output_embeddings()`; its configuration's final softcap and logit scale are honoured, and
                so is a vocabulary that is padded in the weight alone.

        Raises:
            TypeError: the model has no output embeddings, so it can't predict tokens.
            ValueError: PEFT has put an adapter on them.
        """
        layer: Any = getattr(model, "get_output_embeddings", lambda: None)()
        if layer is None:
            raise TypeError(f"{type(model).__name__} has no output embeddings; expected a causal language model.")
        if hasattr(layer, "base_layer"):
            raise ValueError(
                f"{type(model).__name__} has an adapter on its output embeddings, which the loss does not read; leave "
                "them out of target_modules, or train them whole with modules_to_save."
            )
        config: Any = getattr(model, "config", None)
        if config is not None:  # of the text, where the model takes images or sound too
            config = config.get_text_config(decoder=True)
        weight, bias = layer.weight, getattr(layer, "bias", None)
        V = getattr(config, "unpadded_vocab_size", None)  # Inkling
        if V is not None and weight.shape[0] > V:
            weight, bias = weight[:V], None if bias is None else bias[:V]
        return cls(weight, bias, _scale(config), _first(config, SOFTCAPS))

    @classmethod
    def checked(cls, model: nn.Module) -> Unembedding:
        """Read it, and hold it to the logits that the model itself makes of random hidden states.

        That takes one call of the output layer: the base model is left out, or, where the model's forward goes past
        it, run over two tokens. A weight that is no tensor with values is held to nothing: on the meta device, sharded
        or quantised.

        Args:
            model: as in `of`.

        Raises:
            TypeError, ValueError: as `of`.
            ValueError: the model makes its logits in another way.
        """
        output = cls.of(model)
        base = getattr(model, "base_model", None)
        if not isinstance(base, nn.Module) or base is model or not has_values(output.weight):
            return output
        with undisturbed(model):
            same = _makes_its_logits_so(model, base, output)
        if not same:
            raise ValueError(
                f"model is {type(model).__name__}, which has something else than a linear layer, a scale and a softcap "
                "between its base model and its logits; expected a causal language model whose logits these three make."
            )
        return output

    def scaled(self, hidden: Tensor) -> Tensor:
        """Hidden states of which weight, bias and softcap alone make logits."""
        return hidden if self.scale == 1 else hidden * self.scale

    def logits(self, hidden: Tensor) -> Tensor:  # [..., D]
        """Logits [..., V]."""
        logits = nn.functional.linear(self.scaled(hidden), self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    return next((float(x) for name in names if (x := getattr(config, name, None)) is not None), None)


def _scale(config: Any) -> float:
    """Give what a model multiplies its logits by, which is the same to its hidden states."""
    if config is None or config.model_type == "mpt":  # has a logit_scale that transformers does not use
        return 1.0
    factor, divisor = _first(config, FACTORS), _first(config, DIVISORS)
    if factor is not None or divisor is None:
        return 1.0 if factor is None else factor
    return divisor if config.model_type == "hyperclovax" else 1 / divisor


class _BaseOutput(tuple[Tensor]):
    """What a base model gives, where its last hidden state is all there is."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def has_values(parameter: Tensor) -> bool:
    """Whether a model can be run for a look at what it does: not on the meta device, sharded or quantised."""
    values = parameter.detach()
    return type(values) is Tensor and not values.is_meta and values.is_floating_point()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout inside the block; modes and random numbers are as before after it."""
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _makes_its_logits_so(model: Any, base: Any, output: Unembedding) -> bool:
    D, device, dtype = output.weight.shape[1], output.weight.device, output.weight.dtype
    hidden = torch.randn(1, 2, D, generator=torch.Generator().manual_seed(0), device="cpu").to(device, dtype)
    # The logits of the second go past any softcap, those of the first do not.
    largest = nn.functional.linear(hidden[:, 1], output.weight).abs().amax()
    hidden[:, 1] *= (100 / largest).clamp(1, 1000)
    tokens = torch.arange(2, device=device)[None]
    with _standing_in(base, hidden) as calls:
        try:
            logits = model.forward(tokens, use_cache=False).logits
        except RuntimeError:  # its base model gives hidden states of another width
            calls.clear()
    if not calls:
        hidden = base(input_ids=tokens, use_cache=False).last_hidden_state
        if hidden.shape[-1] != D:
            return False
        logits = model.forward(tokens, use_cache=False).logits
    ours = output.logits(hidden)
    if ours.shape != logits.shape:
        return False
    # A scale of the hidden states rounds otherwise than one of the logits, by less than this.
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-3)
    size = logits.float().abs().amax(-1, keepdim=True)
    return torch.allclose(ours.float() / size, logits.float() / size, rtol=0, atol=tolerance, equal_nan=True)


@contextmanager
def _standing_in(base: Any, hidden: Tensor) -> Iterator[list[None]]:
    """A base model gives these hidden states inside the block; the list has an entry for every call."""
    calls: list[None] = []

    def forward(*_: Any, **__: Any) -> _BaseOutput:
        calls.append(None)
        return _BaseOutput([hidden])

    own = vars(base).get("forward")  # that of a library which has put itself around the class's
    base.forward = forward
    try:
        yield calls
    finally:
        del base.forward
        if own is not None:
            base.forward = own
