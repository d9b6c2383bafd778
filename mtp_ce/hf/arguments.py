"""The closed boundary of a wrapper's forward: every argument is read by the wrapper or by its model, or is refused.

Models of transformers take `**kwargs` and ignore what they don't know, so that a misspelt `token_weight=` would train
without weights. What a model reads is in the signature of its forward: the parameters, and for `**kwargs` those that
transformers documents for all models (`TransformersKwargs`, `FlashAttentionKwargs`) and those of its annotation.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

from torch import Tensor
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import TransformersKwargs

# Options of the loss that a call may set; the others are the model's (softcap) or the trainer's (shift, reduction).
LOSS_OPTIONS = ("head_reduction", "ignore_index", "label_smoothing", "left_halo", "loss_scale", "z_loss")
# Tensors of the loss that a call may pass under the names of `weighted_mtp_ce`.
LOSS_INPUTS = ("head_weights", "seq_lens")
# Which rows the linear path computes.
LOSS_ROWS = "drop_dead_rows"
# What transformers' decorators take out of the arguments of any forward.
_OF_ANY_MODEL = frozenset({"return_dict", "output_attentions", "output_hidden_states", "use_cache"})
# What a model's own forward reads for logits and loss, after its base model.
_OF_LOGITS = frozenset({"labels", "logits_to_keep", "num_items_in_batch"})
# Requests for outputs that `MTPOutput` does not have.
_OUTPUTS = ("output_attentions", "output_hidden_states")


class LossArguments(NamedTuple):
    """What a call passes for the loss alone, by other names than the parameters of the wrapper's forward."""

    targets: Tensor | None  # [B, T], labels
    shift: int  # of the labels
    options: dict[str, Any]
    tensors: dict[str, Any]
    drop_dead_rows: Any  # as in `weighted_mtp_linear_ce`; None where not given

    @classmethod
    def take(cls, labels: Tensor | None, arguments: dict[str, Any]) -> LossArguments:
        """Take them out of the arguments of a call; those for the model stay.

        Raises:
            ValueError: both labels and shift_labels.
        """
        shift_labels = arguments.pop("shift_labels", None)
        if labels is not None and shift_labels is not None:
            raise ValueError("labels and shift_labels are both given; expected one of them.")
        options, tensors = (
            {name: arguments.pop(name) for name in names if name in arguments} for names in (LOSS_OPTIONS, LOSS_INPUTS)
        )
        targets, shift = (labels, 1) if shift_labels is None else (shift_labels, 0)
        return cls(targets, shift, options, tensors, arguments.pop(LOSS_ROWS, None))

    def _halo(self, S: int) -> int:
        """Return how many tokens beyond S positions the labels have."""
        assert self.targets is not None
        return self.targets.shape[-1] - self.options.get("left_halo", 0) - S + 1 - self.shift

    def check_halo(self, S: int, horizon: int, limit: int, what: str) -> None:
        """Check that heads can be trained to predict all tokens beyond S positions.

        Args:
            S: number of positions.
            horizon: H.
            limit: how many they can; H means any number.
            what: limits them, for the message.

        Raises:
            ValueError: there are more.
        """
        halo = self._halo(S)
        # Labels that are shifted already are one token ahead without a halo.
        if self.targets is not None and limit < horizon and halo > max(limit, 1 - self.shift):
            raise ValueError(
                f"{'labels' if self.shift else 'shift_labels'} is {list(self.targets.shape)} for {S} positions, with "
                f"{halo} tokens beyond them; expected at most {limit} with {what} and horizon {horizon}: others are "
                "predicted from beyond the inputs."
            )

    def check_next_tokens(self, S: int, horizon: int, next_input_ids: Tensor | None, what: str) -> None:
        """Check that a call passes the tokens that heads read before they predict those beyond S positions.

        Args:
            S: number of positions.
            horizon: H.
            next_input_ids: [B, n], the tokens.
            what: reads them, for the message.

        Raises:
            ValueError: they are missing, or too few.
        """
        halo = self._halo(S)
        needed = min(horizon, halo) - 1
        if needed > 0 and (next_input_ids is None or next_input_ids.shape[1] < needed):
            found = None if next_input_ids is None else list(next_input_ids.shape)
            raise ValueError(
                f"next_input_ids is {found} with labels of {halo} tokens beyond the inputs; expected the {needed} "
                f"tokens after input_ids, [B, {needed}], which {what} reads before it predicts."
            )

    def refuse(self, **others: Any) -> None:
        """Check that a call without labels has nothing for the loss.

        Args:
            **others: parameters of the wrapper's forward that only the loss reads; None where not given.

        Raises:
            ValueError: one is given.
        """
        for name, value in {**others, **self.tensors, **self.options, LOSS_ROWS: self.drop_dead_rows}.items():
            if value is not None:
                raise ValueError(f"{name} is given without labels, where nothing reads it; expected labels, too.")


class ModelArguments(NamedTuple):
    """Names of the arguments that a causal language model reads, and its wrapper."""

    model: str  # its class
    own: frozenset[str]  # of its own forward
    base: frozenset[str]  # of those, what reaches its base model, which computes the hidden states for a loss
    wrapper: frozenset[str]  # of the wrapper's forward, for messages

    @classmethod
    def of(cls, model: Any, causal: Any, forward: Callable[..., Any]) -> ModelArguments:
        """Read the signatures.

        Args:
            model: the model, perhaps in PEFT's wrapper.
            causal: the causal language model itself.
            forward: the wrapper's.
        """
        own = forward_arguments(causal)
        # Some models' own forward passes more on than the base model's signature has.
        base = (forward_arguments(causal.base_model) | own) - _OF_LOGITS
        if model is not causal:
            own |= forward_arguments(model) | {"adapter_names"}
        named = inspect.signature(forward).parameters.values()
        wrapper = {parameter.name for parameter in named if parameter.kind is not parameter.VAR_KEYWORD}
        wrapper |= {*LOSS_OPTIONS, *LOSS_INPUTS, LOSS_ROWS}
        return cls(type(causal).__name__, own, base, frozenset(wrapper - {"self"}))

    def check_own(self, arguments: Mapping[str, Any]) -> None:
        """Check the arguments of a call without labels, which the model's own forward answers.

        Args:
            arguments: for the model.

        Raises:
            TypeError: the model reads no such argument.
        """
        for name, value in arguments.items():
            if value is not None and name not in self.own:
                self._refuse(name, self.own)

    def check_base(self, arguments: Mapping[str, Any]) -> None:
        """Check the arguments of a call that computes the heads' hidden states.

        Args:
            arguments: for the model.

        Raises:
            TypeError: the argument does not reach the base model.
            ValueError: an output that the wrapper does not return.
        """
        for name, value in arguments.items():
            if value is not None and name not in self.base:
                if name in self.own:
                    raise TypeError(
                        f"{name} is given for the loss or the hidden states of the heads, where nothing reads it; "
                        f"expected a call without labels, which is {self.model}'s own forward."
                    )
                self._refuse(name, self.base)
        for name in _OUTPUTS:
            if arguments.get(name):
                raise ValueError(
                    f"{name} is True with labels, where no such output is returned; expected a call without labels, "
                    f"which is {self.model}'s own forward."
                )

    def _refuse(self, name: str, read: frozenset[str]) -> None:
        known = sorted(read | self.wrapper)
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        expected = nearest[0] if nearest else f"one of {', '.join(known)}"
        raise TypeError(f"{name} is an argument that neither MTPWrapper nor {self.model} reads; expected {expected}.")


def forward_arguments(module: Any) -> frozenset[str]:
    """Return the names of the arguments that a module's forward reads."""
    known = set(_OF_ANY_MODEL)
    # The class's own: libraries that move parameters replace the instance's by a function of any arguments.
    for parameter in inspect.signature(type(module).forward).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            known.add(parameter.name)
            continue
        documented = (TransformersKwargs, FlashAttentionKwargs, *get_args(parameter.annotation))
        for keywords in documented:
            known.update(getattr(keywords, "__annotations__", ()))
            known.update(getattr(keywords, "__optional_keys__", ()))
    return frozenset(known - {"self", "args"})
