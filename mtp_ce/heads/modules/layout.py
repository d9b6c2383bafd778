"""What must be known of a checkpoint's MTP module to read, run and write it. Needs neither torch nor transformers.

    h        = hidden_norm(hidden)        e = token_norm(embed(next token))
    x        = projection([h; e]) or projection([e; h])
    hidden_k = output_norm(decoder layer(x))

Layouts differ in the names of these parts, in the order of the projection's halves, and in what engines feed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class ModuleLayout(NamedTuple):
    """One layout.

    Attributes:
        name: as `export-mtp` has it.
        prefix: what the names of module k begin with; `{k}` is its number, from 0 on, and `{layer}` k + the number of
            the model's own decoder layers.
        decoder: what follows the prefix in the names of its decoder layer's tensors, which are those of the model's.
        hidden_norm: name of the norm of the hidden state, after the prefix; likewise the next three.
        token_norm: of the norm of the next token's embedding.
        projection: of the linear layer [D, 2 D] that joins the two.
        output_norm: of the norm before the output layer.
        hidden_first: whether the projection reads [hidden; embedding], and not [embedding; hidden].
        passes_normed: whether a further depth reads the hidden state after output_norm, and not before it.
        masks_first: whether the embedding at position 0 is zero.
        counts: configuration keys that hold the number of modules; the first one is written.
        copies: modules that some checkpoints store once more, after the prefix, and whose they are: "embed" or
            "output", the model's own.
        single: whether there is at most one module.
        families: model types for which engines read a new module in this layout.
        unnormed: model types whose further depths read the hidden state before output_norm, whatever `passes_normed`.
    """

    name: str
    prefix: str
    decoder: str
    hidden_norm: str
    token_norm: str
    projection: str
    output_norm: str
    hidden_first: bool
    passes_normed: bool
    masks_first: bool
    counts: tuple[str, ...]
    copies: Mapping[str, str] = {}
    single: bool = False
    families: tuple[str, ...] = ()
    unnormed: tuple[str, ...] = ()

    def of(self, model_type: str) -> ModuleLayout:
        """Return the layout as engines run it for models of a type."""
        return self._replace(passes_normed=self.passes_normed and model_type not in self.unnormed)
