"""The loss's options and inputs: two objects that travel from the public functions to the kernel launchers.

Needs no torch. Tensors and devices are checked in checks.py.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

CHOICES = {
    "weight_alignment": ("position", "target"),
    "head_reduction": ("live", "horizon", "target"),
    "reduction": ("mean", "sum", "none"),
    "impl": ("auto", "triton", "cpu", "reference"),
}


def check_choice(name: str, value: object) -> None:
    """ValueError unless the value is one of the argument's choices."""
    if value not in CHOICES[name]:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, CHOICES[name]))}.")


# The numbers of the loss that may be 0-d tensors, in the order of `LossInputs.terms`, and what stands for such a tensor
# in `LossOptions`: that the term is there, not how large it is.
TERMS = ("loss_scale", "softcap", "z_loss", "label_smoothing")
CHANGES = 0.5

# What is taken as a number, numpy's scalars included; the abstract classes last, since they take longer to ask.
INTEGERS: tuple[Any, ...] = (int, numbers.Integral)
NUMBERS: tuple[Any, ...] = (float, int, numbers.Real)


@dataclass(frozen=True)
class LossOptions:
    """What the loss computes, beside its tensors; see `weighted_mtp_ce` for each option.

    Raises:
        TypeError, ValueError: an option of the wrong type or value.
    """

    shift: int = 1
    left_halo: int = 0
    weight_alignment: str = "position"
    head_reduction: str = "live"
    ignore_index: int = -100
    reduction: str = "mean"
    loss_scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_choice("weight_alignment", self.weight_alignment)
        check_choice("head_reduction", self.head_reduction)
        check_choice("reduction", self.reduction)
        self._check_integer("shift", self.shift)
        self._check_integer("left_halo", self.left_halo)
        self._check_integer("ignore_index", self.ignore_index)
        self._check_number("loss_scale", self.loss_scale)
        self._check_number("z_loss", self.z_loss)
        self._check_number("label_smoothing", self.label_smoothing)
        if self.softcap is not None:
            self._check_number("softcap", self.softcap)
        if self.shift < 0:
            raise ValueError(
                f"shift is {self.shift}; expected 0 (labels shifted already), 1 (as in transformers) or more."
            )
        if self.left_halo < 0:
            raise ValueError(
                f"left_halo is {self.left_halo}; expected the number of tokens of labels before position 0, 0 or more."
            )
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap is {self.softcap}; expected a number above 0, or None for no cap.")
        if self.z_loss < 0:
            raise ValueError(f"z_loss is {self.z_loss}; expected a factor of at least 0.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; expected a share in [0, 1).")

    def _check_integer(self, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, INTEGERS):
            raise TypeError(f"{name} is {type(value).__name__}; expected an int.")
        if not isinstance(value, int):
            object.__setattr__(self, name, int(value))

    def _check_number(self, name: str, number: Any) -> None:
        if isinstance(number, bool) or not isinstance(number, NUMBERS):
            raise TypeError(f"{name} is {type(number).__name__}; expected a float.")
        # Not math.isfinite: torch.compile traces comparisons of a float that changes between calls.
        if not -math.inf < number < math.inf:
            raise ValueError(f"{name} is {number}; expected a finite number.")
        if not isinstance(number, float):
            object.__setattr__(self, name, float(number))

    def values(self) -> tuple[Any, ...]:
        """Return the values in the order of the fields, as the operators' schemas take them."""
        # Spelled out, since this runs twice in a call of the loss; a test compares it with the fields.
        return (
            self.shift, self.left_halo, self.weight_alignment, self.head_reduction, self.ignore_index, self.reduction,
            self.loss_scale, self.softcap, self.z_loss, self.label_smoothing,
        )  # fmt: skip

    @classmethod
    def from_values(cls, *values: Any) -> LossOptions:
        """Rebuild checked options from their `values`."""
        options = object.__new__(cls)
        # Not through __init__: its checks cost a call of the loss 5 microseconds on the host, twice.
        options.__dict__.update(zip(OPTION_NAMES, values, strict=True))
        return options


OPTION_NAMES = tuple(field.name for field in fields(LossOptions))


class LossInputs(NamedTuple):
    """The tensors of one call beside logits or hidden states; None where not given."""

    labels: Tensor  # [B, T] integers, T = left_halo + S + halo
    token_weights: Tensor | None = None  # [B, S] or [B, S, H]; [B, T] where they are those of the targets
    head_weights: Tensor | None = None  # [H]
    seq_lens: Tensor | None = None  # [B]
    document_ids: Tensor | None = None  # [B, T]
    terms: Tensor | None = None  # [4] float64: all of `TERMS`, where one of them is a tensor
    normalizer: float | Tensor | None = None  # a number, or []

    def arguments(self) -> dict[str, Any]:
        """Return the inputs as keyword arguments of the losses."""
        arguments = self._asdict()
        del arguments["terms"]
        return arguments


class VocabShard(NamedTuple):
    """The entries of the vocabulary that this process holds: all of them, or those of one rank."""

    vocab_size: int  # V, of all ranks
    vocab_start: int = 0  # the first entry held here
    ranks: int = 1
    group: str = ""  # the ranks' process group, by its name

    @property
    def largest(self) -> int:
        """Entries of the largest shard, the first; the others may hold fewer, or none."""
        return -(-self.vocab_size // self.ranks)


def read_terms(inputs: LossInputs, options: LossOptions) -> tuple[LossInputs, LossOptions]:
    """Move the terms that are tensors into the options, as numbers, which waits for a GPU.

    Raises:
        ValueError: one is out of its range.
    """
    if inputs.terms is None:
        return inputs, options
    terms = dict(zip(TERMS, inputs.terms.tolist(), strict=True))
    if options.softcap is None:
        terms["softcap"] = None
    return inputs._replace(terms=None), replace(options, **terms)


def fold_normalizer(inputs: LossInputs, options: LossOptions) -> tuple[LossInputs, LossOptions]:
    """Move a normalizer that is a number into the loss scale: the operators take a tensor or None."""
    number = inputs.normalizer
    if not isinstance(number, numbers.Real):
        return inputs, options
    if inputs.terms is not None:
        terms = inputs.terms.clone()
        terms[0] /= float(number)
        return inputs._replace(terms=terms, normalizer=None), replace(options, reduction="sum")
    scale = options.loss_scale / float(number)
    return inputs._replace(normalizer=None), replace(options, loss_scale=scale, reduction="sum")


class CommonOptions(TypedDict, total=False):
    """Keyword arguments of both losses that hold for a whole run."""

    shift: int
    left_halo: int
    weight_alignment: str
    head_reduction: str
    head_weights: Tensor | None
    ignore_index: int
    reduction: str
    loss_scale: float | Tensor
    softcap: float | Tensor | None
    z_loss: float | Tensor
    label_smoothing: float | Tensor
    validate: bool
    impl: str


class CallOptions(CommonOptions, total=False):
    """Those, and the keyword arguments of one batch."""

    seq_lens: Tensor | None
    document_ids: Tensor | None
    normalizer: float | Tensor | None
