"""A passage of text with the weight of every token, and the colours that weights have.

A weight of 1 has no colour. Blue grows towards 0 and orange towards the highest weight shown, each evenly on its own
side, so that 1 is the middle of the scale wherever the highest weight lies. Colours are translucent: they lie on
white paper and on black.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

# Okabe and Ito's blue and vermilion, told apart by colour-blind eyes too. At an opacity of 0.8 black text on white
# paper and white text on black paper both keep a contrast of at least 4.5 (WCAG 2.2, criterion 1.4.3).
STOPS = ((0.0, "#0072B2CC"), (0.5, "#0072B200"), (0.5, "#D55E0000"), (1.0, "#D55E00CC"))
SCALE = LinearSegmentedColormap.from_list("weights", STOPS)
# Ends of a scale nearer to 1 would paint rounding errors of uniform weights in full colour.
_LEAST_TOP = 2.0

# Stand for a line's end, a token that is only a part of a character, and a character that has no shape of its own.
NEWLINE, PART, SHAPELESS = "↵", "·", "□"


@dataclass(frozen=True)
class Passage:
    """Text of one document, token by token.

    Attributes:
        title: what stands above it, such as the file's path.
        texts: one piece of text a token; joined they are the passage.
        weights: one a token; NaN where a token has none.
        details: what the weights come from, by name: one number a token, NaN where unknown.
        units: unit of a detail, by name; none for one that is not listed.

    Raises:
        ValueError: weights or a detail is not as long as texts.
    """

    title: str
    texts: Sequence[str]
    weights: Sequence[float]
    details: Mapping[str, Sequence[float]]
    units: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, numbers in {"weights": self.weights, **self.details}.items():
            if len(numbers) != len(self.texts):
                raise ValueError(
                    f"{name} of passage {self.title!r} has {len(numbers)} numbers; expected one for each of the "
                    f"{len(self.texts)} texts."
                )


def token_texts(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """Give the piece of text of each token, special tokens included; joined they are the decoded text.

    A character cut by a border between tokens belongs to the token that completes it, and the others are empty.
    """
    stream = DecodeStream(skip_special_tokens=False)
    texts = [stream.step(tokenizer.backend_tokenizer, i) or "" for i in ids]
    if texts:
        # The stream waits for the rest of a character that the end of the passage cuts.
        whole: str = tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
        texts[-1] += whole[len("".join(texts)) :]
    return texts


def weight_norm(passages: Sequence[Passage]) -> TwoSlopeNorm:
    """Map 0 to 0, 1 to the middle and the highest weight of all to 1."""
    weights = np.concatenate([[_LEAST_TOP], *(passage.weights for passage in passages)])
    return TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=float(np.nanmax(weights)))


def scale_ticks(norm: TwoSlopeNorm) -> list[float]:
    """Give five weights that are evenly spread over the scale."""
    assert norm.vmax is not None
    return [0.0, 0.5, 1.0, (1.0 + norm.vmax) / 2, norm.vmax]


def summary(passage: Passage) -> str:
    """Say in one line how many tokens there are and how unequal their weights."""
    weights = np.asarray(passage.weights, dtype=float)
    weights = weights[~np.isnan(weights)]
    counted = f"{len(passage.texts):,} tokens, {len(weights):,} with a weight"
    if not weights.any():
        return counted
    ess = weights.sum() ** 2 / np.square(weights).sum()
    share = ess / len(weights)
    return f"{counted}; mean weight {weights.mean():.3f}; effective sample size {ess:,.0f} tokens ({share:.0%})"
