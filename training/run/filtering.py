"""The baseline of a comparison without token weights: documents filtered by the loss of the reference model.

    ce(d) = mean cross entropy of the first tokens of document d under the reference        nats

The documents of the lowest ce are kept, as many as hold the fraction of the tokens that is asked for.
"""

from __future__ import annotations

import torch

from mtp_ce.next_token import NextToken
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.data.tokens import DocumentTokens
from mtp_ce.training.loop.weighing import FrozenModels, load_frozen
from mtp_ce.training.run.inputs import Inputs

# Tokens that the reference reads of a document: enough to tell text from noise, and cheap in a corpus of long files.
FIRST_TOKENS = 256


@torch.no_grad()
def best_predicted(recipe: Recipe, inputs: Inputs, models: FrozenModels, fraction: float) -> DocumentTokens:
    """Return the training documents that the reference predicts best.

    Args:
        recipe: one with a reference.
        inputs: its inputs.
        models: folders of the frozen models, by role.
        fraction: of the training tokens, which the kept documents hold, to the nearest document.
    """
    (role,) = [model for model in recipe.frozen_models() if model.role == "reference"]
    reference = load_frozen(role, models["reference"], recipe.train.precision, inputs.device)
    documents = inputs.tokens.train
    losses = []
    for document in documents:
        ids = document[None, :FIRST_TOKENS].to(inputs.device)
        losses.append(NextToken.of(reference, ids).token_ce(ids).nanmean())
    order = torch.stack(losses).cpu().nan_to_num(torch.inf).argsort(stable=True)
    lengths = documents.starts.diff()[order].double()
    # A document is kept if most of it is within the fraction.
    kept = lengths.cumsum(0) - lengths / 2 <= fraction * lengths.sum()
    return documents.choose(sorted(order[kept].tolist()))
