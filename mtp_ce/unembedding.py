"""The output layer of a causal language model: weight, bias, scale and softcap.

    logits = softcap( (scale * hidden) W^T + bias )         softcap(x) = c tanh(x / c)

Architectures name scale and softcap differently, and some have a further layer between the base model and the output
layer. `Unembedding.checked` therefore compares what it reads from the configuration with the model's own logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtp_ce.vocabulary import linear, whole

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
        """Read the output layer of a Hugging Face model.

        Args:
            model: has `get_output_embeddings()`; its configuration's final softcap and logit scale are applied, and a
                vocabulary that is padded in the weight alone is cut to its size.

        Raises:
            TypeError: the model has no output embeddings, so it can't predict tokens.
            ValueError: PEFT has put an adapter on them.
        """
        layer: Any = getattr(model, "get_output_embeddings", lambda: None)()
        if layer is None:
            raise TypeError(f"{type(model).__name__} has no output embeddings; expected a causal language model.")
        if hasattr(layer, "base_layer"):
            raise ValueError(
                f"{type(model).__name__} has an adapter on its output embeddings, which the loss does not apply; leave "
                "them out of target_modules, or train them in full with modules_to_save."
            )
        config: Any = getattr(model, "config", None)
        if config is not None:  # of the text, where the model takes images or audio too
            config = config.get_text_config(decoder=True)
        weight, bias = layer.weight, getattr(layer, "bias", None)
        V = getattr(config, "unpadded_vocab_size", None)  # Inkling
        if V is not None and weight.shape[0] > V:
            weight, bias = weight[:V], None if bias is None else bias[:V]
        return cls(weight, bias, _scale(config), _first(config, SOFTCAPS))

    @classmethod
    def checked(cls, model: nn.Module) -> Unembedding:
        """Read the output layer, and check it against the model's own logits of random hidden states.

        The check costs one call of the output layer: the base model is skipped, or, where the model's forward does not
        call it, run over two tokens. A weight without values (on the meta device, sharded or quantised) is not checked.

        Args:
            model: as in `of`.

        Raises:
            TypeError, ValueError: as `of`.
            ValueError: the model computes its logits in another way, or its output layer is quantised.
        """
        output = cls.of(model)
        values = output.weight.detach()
        if getattr(model, "is_quantized", False) and not (type(values) is Tensor and values.is_floating_point()):
            layer = type(model.get_output_embeddings()).__name__  # type: ignore[operator]
            raise ValueError(
                f"model is {type(model).__name__}, whose output layer is quantised: {layer} with a weight "
                f"{type(output.weight).__name__} of {values.dtype}; expected floating point. Load the model with its "
                "output layer, often 'lm_head', in llm_int8_skip_modules or modules_to_not_convert."
            )
        base = getattr(model, "base_model", None)
        if not isinstance(base, nn.Module) or base is model or not has_values(output.weight):
            return output
        with undisturbed(model):
            same = _matches(model, base, output)
        if not same:
            raise ValueError(
                f"model is {type(model).__name__}, which has more than a linear layer, a scale and a softcap between "
                "its base model and its logits; expected a causal language model with these three only."
            )
        return output

    def scaled(self, hidden: Tensor) -> Tensor:
        """Return scaled hidden states, from which weight, bias and softcap compute the logits."""
        return hidden if self.scale == 1 else hidden * self.scale

    def detached(self) -> Unembedding:
        """Return the same layer, which no gradient reaches."""
        return self._replace(weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def logits(self, hidden: Tensor) -> Tensor:  # [..., D]
        """Return logits [..., V], gathered where the layer is sharded over ranks."""
        logits: Tensor = whole(linear(self.scaled(hidden), self.weight, self.bias))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    return next((float(x) for name in names if (x := getattr(config, name, None)) is not None), None)


def _scale(config: Any) -> float:
    """Return the factor of a model's logits, applied to its hidden states here."""
    if config is None or config.model_type == "mpt":  # its logit_scale is not used by transformers
        return 1.0
    factor, divisor = _first(config, FACTORS), _first(config, DIVISORS)
    if factor is not None or divisor is None:
        return 1.0 if factor is None else factor
    return divisor if config.model_type == "hyperclovax" else 1 / divisor


class _BaseOutput(tuple[Tensor]):
    """Output of a base model with nothing but its last hidden state."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def has_values(parameter: Tensor) -> bool:
    """Return whether a model can be run to check it: not on the meta device, sharded or quantised."""
    values = parameter.detach()
    return type(values) is Tensor and not values.is_meta and values.is_floating_point()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Disable gradients and dropout inside the block; restore modes and random state at its end."""
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _matches(model: Any, base: Any, output: Unembedding) -> bool:
    """Return whether the model's logits are those of the output layer as read."""
    D, device, dtype = output.weight.shape[1], output.weight.device, output.weight.dtype
    hidden = torch.randn(1, 2, D, generator=torch.Generator().manual_seed(0), device="cpu").to(device, dtype)
    # The logits of the second position exceed any softcap, those of the first do not.
    largest = nn.functional.linear(hidden[:, 1], output.weight).abs().amax()
    hidden[:, 1] *= (100 / largest).clamp(1, 1000)
    tokens = torch.arange(2, device=device)[None]
    with _base_replaced(base, hidden) as calls:
        try:
            logits = model.forward(tokens, use_cache=False).logits
        except RuntimeError:  # its base model returns hidden states of another width
            calls.clear()
    if not calls:
        hidden = base(input_ids=tokens, use_cache=False).last_hidden_state
        if hidden.shape[-1] != D:
            return False
        logits = model.forward(tokens, use_cache=False).logits
    ours = output.logits(hidden)
    if ours.shape != logits.shape:
        return False
    # Scaling the hidden states rounds differently from scaling the logits, by less than this.
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-3)
    size = logits.float().abs().amax(-1, keepdim=True)
    return torch.allclose(ours.float() / size, logits.float() / size, rtol=0, atol=tolerance, equal_nan=True)


@contextmanager
def _base_replaced(base: Any, hidden: Tensor) -> Iterator[list[None]]:
    """Have a base model return these hidden states inside the block; the list gets an entry for every call."""
    calls: list[None] = []

    def forward(*_: Any, **__: Any) -> _BaseOutput:
        calls.append(None)
        return _BaseOutput([hidden])

    patched = vars(base).get("forward")  # by a library that wraps the class's own forward
    base.forward = forward
    try:
        yield calls
    finally:
        del base.forward
        if patched is not None:
            base.forward = patched
