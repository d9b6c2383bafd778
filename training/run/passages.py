"""Token weights of held-out passages under the run's scorer, as an HTML page and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.training.data.python_source import is_documented
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
    """Weigh the first rows of some held-out documents with the trained model; write weights.html and weights.png.

    Args:
        inputs: tokenizer and held-out documents.
        weighing: the run's scorer.
        model: the trained model, whose losses and drafts the scorer may use.
        scorer: name of the scorer.
        folder: where the two files are written.

    Returns:
        The two files.
    """
    model.eval()
    passages = [_passage(inputs, weighing, model, index) for index in _choose(inputs)]
    model.train()
    page, picture = folder / "weights.html", folder / "weights.png"
    title = f"{folder.name}: weights of held-out tokens"
    write_page(passages, page, title=title, scorer=scorer)
    draw_weights(passages, picture, title=title, scorer=scorer)
    return [page, picture]


def _choose(inputs: Inputs) -> list[int]:
    """Return indices of held-out documents, evenly spread; documented ones if any, because they mix prose and code."""
    documents = inputs.corpus.held_out
    indices = [i for i in range(len(documents)) if is_documented(documents[i])] or list(range(len(documents)))
    return indices[:: max(1, len(indices) // PASSAGES)][:PASSAGES]


def _passage(inputs: Inputs, weighing: Weighing, model: MTPWrapper, index: int) -> Passage:
    document = inputs.tokens.held_out[index][: ROWS_EACH * inputs.row_length]
    # Packed even if the run's rows are padded: those would cut the document after its first row.
    pad: Any = inputs.tokenizer.pad_token_id
    rows = PackedRows([document], inputs.row_length, pad)
    batch = rows.batch(torch.arange(len(rows))).to(inputs.device)
    current = model.next_token(input_ids=batch.input_ids, position_ids=batch.position_ids)
    details = weighing.explain(batch, current)
    weights = weighing.weigh(batch, current).weights
    if "score" in details:
        # A token without a score has the neutral weight, which would look like a result.
        weights = torch.where(details["score"].isnan(), torch.nan, weights)

    def flat(tensor: Tensor) -> list[float]:
        values: list[float] = tensor.flatten()[: len(document)].tolist()
        return values

    return Passage(
        title=inputs.corpus.held_out[index].path,
        texts=token_texts(inputs.tokenizer, document.tolist()),
        weights=flat(weights),
        details={name: flat(part) for name, part in details.items()},
        units=weighing.units,
    )
