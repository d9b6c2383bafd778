"""A passage of text with the weight of every token, and the colour scale of weights.

A weight of 1 has no colour. Blue increases towards 0 and orange towards the highest weight shown, each linear on its
own side, so 1 is the middle of the scale whatever the highest weight. Translucent colours suit light and dark pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

# Blue and vermilion of the colour-blind safe palette of Okabe and Ito. At an opacity of 0.8 black text on white
# paper and white text on black paper both keep a contrast of at least 4.5 (WCAG 2.2, criterion 1.4.3).
STOPS = ((0.0, "#0072B2CC"), (0.5, "#0072B200"), (0.5, "#D55E0000"), (1.0, "#D55E00CC"))
SCALE = LinearSegmentedColormap.from_list("weights", STOPS)
# Minimum upper end of the scale; a lower one would paint rounding errors of uniform weights in full colour.
_LEAST_TOP = 2.0

# Marks of a newline, of a token that is only a part of a character, and of an invisible character.
NEWLINE, PART, SHAPELESS = "↵", "·", "□"


@dataclass(frozen=True)
class Passage:
    """Text of one document, token by token.

    Attributes:
        title: title of the passage, such as the file's path.
        texts: one string per token; joined they are the passage.
        weights: one per token; NaN for a token without a weight.
        details: quantities behind the weights, by name: one number per token, NaN if unknown.
        units: unit of a detail, by name; details that are not listed have none.

    Raises:
        ValueError: weights or a detail differ in length from texts.
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
    """Return the text of each token, special tokens included; joined they are the decoded text.

    A character split over several tokens belongs to the token that completes it; the texts of the others are empty.
    """
    stream = DecodeStream(skip_special_tokens=False)
    texts = [stream.step(tokenizer.backend_tokenizer, i) or "" for i in ids]
    if texts:
        # The stream holds back an incomplete character at the end of the passage.
        whole: str = tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
        texts[-1] += whole[len("".join(texts)) :]
    return texts


def weight_norm(passages: Sequence[Passage]) -> TwoSlopeNorm:
    """Map 0 to 0, 1 to the middle and the highest weight of all to 1."""
    weights = np.concatenate([[_LEAST_TOP], *(passage.weights for passage in passages)])
    return TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=float(np.nanmax(weights)))


def scale_ticks(norm: TwoSlopeNorm) -> list[float]:
    """Return five weights, evenly spaced on the scale."""
    assert norm.vmax is not None
    return [0.0, 0.5, 1.0, (1.0 + norm.vmax) / 2, norm.vmax]


def summary(passage: Passage) -> str:
    """Format the number of tokens, their mean weight and effective sample size in one line."""
    weights = np.asarray(passage.weights, dtype=float)
    weights = weights[~np.isnan(weights)]
    counted = f"{len(passage.texts):,} tokens, {len(weights):,} with a weight"
    if not weights.any():
        return counted
    ess = weights.sum() ** 2 / np.square(weights).sum()
    ratio = ess / len(weights)
    return f"{counted}; mean weight {weights.mean():.3f}; effective sample size {ess:,.0f} tokens ({ratio:.0%})"
