"""What a scorer thinks of held-out text: passages with the weight of every token, as a page and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.scorers.next_token import NextToken
from mtp_ce.training.data.corpus import is_documented
from mtp_ce.training.data.rows import PackedRows
from mtp_ce.training.loop.weighing import Weighing
from mtp_ce.training.report.weights_passage import Passage, token_texts
from mtp_ce.training.report.weights_plot import draw_weights
from mtp_ce.training.report.weights_view import write_page
from mtp_ce.training.run.inputs import Inputs

PASSAGES = 4
ROWS_EACH = 3


@torch.no_grad()
def show_weights(inputs: Inputs, weighing: Weighing, model: MTPWrapper, scorer: str, folder: Path) -> list[Path]:
    """Weigh the beginnings of some held-out documents with the trained model, and show them.

    Args:
        inputs: tokenizer and held-out documents.
        weighing: the run's scorer.
        model: the trained model, whose losses the scorer may ask.
        scorer: its name.
        folder: where weights.html and weights.png are written.

    Returns:
        The two files.
    """
    model.eval()
    passages = [_passage(inputs, weighing, model, place) for place in _choose(inputs)]
    model.train()
    page, picture = folder / "weights.html", folder / "weights.png"
    title = f"{folder.name}: weights of held-out tokens"
    write_page(passages, page, title=title, scorer=scorer)
    draw_weights(passages, picture, title=title, scorer=scorer)
    return [page, picture]


def _choose(inputs: Inputs) -> list[int]:
    """Held-out documents, spread over all of them; documented ones first, because they hold prose and code."""
    documents = inputs.corpus.held_out
    places = [i for i in range(len(documents)) if is_documented(documents[i])] or list(range(len(documents)))
    return places[:: max(1, len(places) // PASSAGES)][:PASSAGES]


def _passage(inputs: Inputs, weighing: Weighing, model: MTPWrapper, place: int) -> Passage:
    document = inputs.tokens.held_out[place][: ROWS_EACH * inputs.row_length]
    # Packed, whatever the run's rows are: padded ones would end after the first.
    pad: Any = inputs.tokenizer.pad_token_id
    rows = PackedRows([document], inputs.row_length, pad)
    batch = rows.batch(torch.arange(len(rows))).to(inputs.device)
    current = NextToken.of(model.causal, batch.input_ids, batch.position_ids)
    parts = weighing.explain(batch, current)
    weights = weighing.weigh(batch, current).weights
    if "score" in parts:
        # What has no score has a neutral weight that says nothing about it.
        weights = torch.where(parts["score"].isnan(), torch.nan, weights)

    def flat(tensor: Tensor) -> list[float]:
        values: list[float] = tensor.flatten()[: len(document)].tolist()
        return values

    return Passage(
        title=inputs.corpus.held_out[place].path,
        texts=token_texts(inputs.tokenizer, document.tolist()),
        weights=flat(weights),
        details={name: flat(part) for name, part in parts.items()},
        units=weighing.units,
    )
