"""Planted noise: what was asked for, in training documents alone, and the truth beside every token."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from mtp_ce.training.data.planted import SPAN
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.run.inputs import Inputs, read_inputs

KINDS = {kind: [f"data.noise={{kind: {kind}, share: 0.4}}"] for kind in ("documents", "spans", "duplicates")}
# Of seven documents 8 copies of a tenth would be none.
KINDS["duplicates"].append("data.noise.copies=3")


@pytest.fixture(scope="module")
def planted(small) -> dict[str, Inputs]:
    """The inputs of each kind."""
    return {kind: read_inputs(small(overrides), Console(quiet=True)) for kind, overrides in KINDS.items()}


def truth(inputs: Inputs) -> list[torch.Tensor]:
    """Which tokens are noise, document by document."""
    documents = inputs.tokens.train
    return list(documents.noise.bool().split(documents.starts.diff().tolist()))


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_text_tokenizer_and_reference_see_nothing_of_the_noise(small, planted, kind):
    inputs, plain = planted[kind], read_inputs(small(), Console(quiet=True))
    assert inputs.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    assert inputs.tokens.held_out.noise is None
    for mine, theirs in (
        (inputs.tokens.held_out, plain.tokens.held_out),
        (inputs.clean.tokens.train, plain.tokens.train),
    ):
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    assert inputs.clean.digests == plain.digests, "a reference that was trained on the clean text is reused"
    assert inputs.digests != plain.digests
    assert plain.tokens.train.noise is None
    assert plain.clean is plain


@pytest.mark.parametrize("kind", ["documents", "spans"])
def test_noise_is_the_documents_own_tokens_in_another_order_and_the_rest_stays(planted, kind):
    inputs = planted[kind]
    shares = []
    for ids, clean, noise in zip(inputs.tokens.train, inputs.clean.tokens.train, truth(inputs), strict=True):
        assert torch.equal(ids[~noise], clean[~noise])
        assert torch.equal(ids[noise].sort().values, clean[noise].sort().values)
        assert not noise[0], "the first token is the border of the document"
        assert not noise[-1]
        assert not noise.any() or (ids[noise] != clean[noise]).float().mean() > 0.5
        shares.append(float(noise[1:-1].float().mean()))
    if kind == "documents":
        assert set(shares) == {0.0, 1.0}
    else:
        assert shares == pytest.approx([0.4] * len(shares), abs=0.05)
        runs = noise[1:-1].int().diff().nonzero().flatten().diff()
        assert set((runs % SPAN).tolist()) == {0}, "whole spans"


def test_every_copy_of_a_duplicate_but_one_is_noise(planted):
    inputs = planted["duplicates"]
    copies: dict[str, list[bool]] = {}
    for document, ids, noise in zip(inputs.corpus.train, inputs.tokens.train, truth(inputs), strict=True):
        text = inputs.tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False)
        assert text == document.text
        assert len({*noise.tolist()}) == 1
        copies.setdefault(document.path, []).append(bool(noise[0]))
    assert list(copies) == [document.path for document in inputs.clean.corpus.train]
    assert {tuple(found) for found in copies.values()} == {(False,), (False, True, True)}


def test_rows_carry_the_truth_of_their_tokens_whichever_documents_they_hold(planted):
    tokens, noise = planted["spans"].tokens.train, truth(planted["spans"])
    chosen = planted["spans"].rows(tokens.choose([1, 3]))
    batch = chosen.batch(torch.arange(len(chosen)))
    expected = torch.cat([noise[1], noise[3]])
    assert torch.equal(batch.noise.flatten()[: len(expected)], expected)
    assert not batch.noise.flatten()[len(expected) :].any(), "padding is no noise"
    first = next(batch.split(2))
    assert torch.equal(first.noise, batch.noise[:2])


def test_noise_follows_from_its_own_seed_alone(small, planted):
    again, other = (
        read_inputs(small([*KINDS["spans"], *more]), Console(quiet=True))
        for more in (["seed=5"], ["data.noise.seed=1"])
    )
    assert again.digests == planted["spans"].digests
    assert other.digests != again.digests
    assert not torch.equal(other.tokens.train.noise, again.tokens.train.noise)


def test_a_run_says_how_many_of_its_tokens_are_noise(small, planted):
    printed = io.StringIO()
    inputs = read_inputs(small(KINDS["duplicates"]), Console(file=printed, width=200))
    share = float(inputs.tokens.train.noise.float().mean())
    assert f"noise       {share:.1%} of the tokens to train on: documents that occur 3 times" in printed.getvalue()


def test_a_share_that_chooses_no_document_or_all_is_refused(small):
    for share in (0.001, 0.999):
        with pytest.raises(RecipeError, match=r"data\.noise\.share 0\.\d+ chooses \d of \d training documents"):
            read_inputs(small([f"data.noise.share={share}"]), Console(quiet=True))
