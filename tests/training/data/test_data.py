"""Packing and order: every token once, borders where documents end, the same order every time."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console

from mtp_ce.ops.rows import count_terms, row_targets
from mtp_ce.options import LossInputs, LossOptions
from mtp_ce.training.data import rows as module
from mtp_ce.training.data import tokens
from mtp_ce.training.data.corpus import texts
from mtp_ce.training.data.reader import read_corpus
from mtp_ce.training.data.rows import PackedRows, PaddedRows, rows_of_step
from mtp_ce.training.data.tokenizer import load_tokenizer
from mtp_ce.training.data.tokens import DocumentTokens, TokenisedCorpus, tokenise, unigram_cross_entropy
from mtp_ce.training.run.inputs import read_inputs

PAD = 99


def documents(*lengths: int) -> list[torch.Tensor]:
    """Documents whose tokens all differ."""
    return list(torch.arange(sum(lengths)).split(list(lengths)))


def test_every_token_appears_once_in_order_and_only_padding_is_added():
    rows = PackedRows(documents(7, 1, 1, 5, 9), row_length=5, pad_id=PAD)
    batch = rows.batch(torch.arange(len(rows)))
    assert batch.input_ids.shape == (5, 5)
    assert batch.input_ids.flatten().tolist() == [*range(23), PAD, PAD]
    assert batch.labels.flatten().tolist() == [*range(23), -100, -100]


def test_positions_begin_again_at_every_document_and_every_row():
    rows = PackedRows(documents(7, 1, 1, 5, 9), row_length=5, pad_id=PAD)
    batch = rows.batch(torch.arange(len(rows)))
    assert batch.document_ids.tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 1, 2, 3],
        [3, 3, 3, 3, 4],
        [4, 4, 4, 4, 4],
        [4, 4, 4, 5, 5],
    ]
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 3, 4],
        [0, 1, 0, 0, 0],
        [0, 1, 2, 3, 0],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 0, 1],
    ]


def test_labels_with_a_halo_go_on_into_the_rows_beside():
    """The inputs stay what they are. Before the text and after it nothing is a label, in documents of their own."""
    plain = PackedRows(documents(7, 1, 1, 5, 9), row_length=5, pad_id=PAD)
    every = torch.arange(len(plain))
    alone, batch = plain.batch(every), plain.with_halos(2, 3).batch(every)
    assert torch.equal(batch.input_ids, alone.input_ids)
    assert torch.equal(batch.position_ids, alone.position_ids)
    assert batch.left_halo == 2
    assert batch.labels[0].tolist() == [-100, -100, 0, 1, 2, 3, 4, 5, 6, 7]
    assert batch.document_ids[0].tolist() == [-1, -1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert batch.labels[3].tolist() == [13, 14, 15, 16, 17, 18, 19, 20, 21, 22]
    assert batch.labels[4].tolist() == [18, 19, 20, 21, 22, -100, -100, -100, -100, -100]
    assert batch.document_ids[4].tolist() == [4, 4, 4, 4, 4, 5, 5, 5, 5, 5]
    assert batch.next_input_ids.tolist() == [[5, 6, 7], [10, 11, 12], [15, 16, 17], [20, 21, 22], [PAD] * 3]
    own = batch.without_halos()
    for name, value in vars(alone).items():
        assert value is None or torch.equal(torch.as_tensor(getattr(own, name)), torch.as_tensor(value)), name
    weights = batch.over_labels(torch.full((5, 5), 0.5))
    assert weights[0].tolist() == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 1, 1]


@pytest.mark.parametrize("H", [1, 4, 7])  # 7: more than a row
def test_packed_rows_with_halos_lose_no_target(H: int):
    """Every head has the rows that it has of the documents alone, and N under "target" is their predicted tokens."""
    lengths = (7, 1, 1, 5, 9, 30, 2)
    plain = PackedRows(documents(*lengths), row_length=5, pad_id=PAD)
    rows = plain.with_halos(H - 1, H)
    found, count, lost = torch.zeros(H, dtype=torch.int64), 0.0, 0
    for batch in rows.in_order(3):
        inputs = LossInputs(batch.labels, document_ids=batch.document_ids)
        options = LossOptions(left_halo=batch.left_halo, head_reduction="target")
        _, _, valid = row_targets(inputs, options, 5, H)
        found += valid.sum((0, 1))
        count += float(count_terms(valid, options, inputs))
        own = batch.without_halos()
        _, _, valid = row_targets(LossInputs(own.labels, document_ids=own.document_ids), LossOptions(), 5, H)
        lost += int(valid[:, :, 0].sum())
    assert found.tolist() == [sum(max(0, n - 1 - h) for n in lengths) for h in range(H)]
    assert count == pytest.approx(sum(n - 1 for n in lengths))
    assert lost < found[0]


def test_padded_rows_have_no_halos():
    """What was cut off is no target."""
    rows = PaddedRows(documents(7, 1, 5), row_length=5, pad_id=PAD)
    assert next(rows.with_halos(2, 3).in_order(3)).labels.shape == (3, 5)


def test_rows_that_fit_exactly_need_no_padding():
    rows = PackedRows(documents(4, 6), row_length=5, pad_id=PAD)
    assert len(rows) == 2
    assert PAD not in rows.batch(torch.arange(2)).input_ids


def test_rows_are_collected_in_the_order_asked_for():
    rows = PackedRows(documents(20), row_length=5, pad_id=PAD)
    assert rows.batch(torch.tensor([3, 0])).input_ids[:, 0].tolist() == [15, 0]
    together = torch.cat([batch.input_ids for batch in rows.in_order(3)])
    assert together.flatten().tolist() == list(range(20))


def test_padded_rows_hold_one_document_each():
    """What is longer is cut; padding is a document of its own, without labels, and its positions begin again."""
    rows = PaddedRows(documents(7, 1, 5), row_length=5, pad_id=PAD)
    batch = next(rows.in_order(8))
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4], [7, PAD, PAD, PAD, PAD], [8, 9, 10, 11, 12]]
    assert batch.labels.tolist() == [[0, 1, 2, 3, 4], [7, -100, -100, -100, -100], [8, 9, 10, 11, 12]]
    assert batch.document_ids.tolist() == [[0] * 5, [1, 3, 3, 3, 3], [2] * 5]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert rows.documents.longer_than(5) == 1
    assert rows.documents.longer_than(4) == 2


def test_rows_spread_evenly_are_those_asked_for():
    rows = PackedRows(documents(50), row_length=5, pad_id=PAD)
    spread = torch.cat([batch.input_ids for batch in rows.in_order(2, most=3)])
    assert spread[:, 0].tolist() == [0, 15, 30]


@pytest.mark.parametrize("kind", [PackedRows, PaddedRows])
def test_chosen_documents_make_the_rows_of_those_alone(kind):
    everything = documents(7, 1, 4, 5, 9)
    chosen = DocumentTokens.of(everything).choose([1, 2, 4])
    again = chosen.choose([1, 2])
    for found, wanted in ((chosen, [1, 2, 4]), (again, [2, 4])):
        alone = [everything[i] for i in wanted]
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
        one, other = (next(kind(some, 6, PAD).in_order(9)) for some in (found, alone))
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.document_ids, other.document_ids)
        assert torch.equal(one.position_ids, other.position_ids)


def test_a_run_with_padded_rows_says_how_many_documents_it_cuts(small):
    printed = io.StringIO()
    inputs = read_inputs(small(["data.packing=padded"]), Console(file=printed, width=200))
    lengths = [len(document) for document in inputs.tokens.train]
    assert f"{sum(n > 64 for n in lengths)} of {len(lengths)} documents cut at 64 tokens" in printed.getvalue()
    assert len(inputs.rows(inputs.tokens.train)) == len(lengths)
    packed = read_inputs(small(), Console(quiet=True))
    assert packed.digests != inputs.digests, "stages that were kept with other rows are not reused"


def test_splitting_a_batch_gives_its_rows():
    batch = PackedRows(documents(20), row_length=5, pad_id=PAD).batch(torch.arange(4))
    parts = list(batch.split(3))
    assert [len(part.labels) for part in parts] == [3, 1]
    assert torch.equal(torch.cat([part.position_ids for part in parts]), batch.position_ids)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 23])
def test_every_row_is_seen_once_per_epoch_whatever_the_batch_size(batch_size):
    """Epochs follow each other without a gap: no short batch, no row lost at the seam."""
    rows, epochs = 10, 3
    steps = math.ceil(epochs * rows / batch_size)
    seen = torch.cat([rows_of_step(step, batch_size, rows, seed=5) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    order = [rows_of_step(step, 4, 100, seed=3) for step in range(50)]
    module.epoch_order.cache_clear()
    # In reverse, so that nothing can hang on what was asked before.
    again = [rows_of_step(step, 4, 100, seed=3) for step in reversed(range(50))][::-1]
    assert torch.equal(torch.cat(order), torch.cat(again))
    assert not torch.equal(torch.cat(order[:25]), torch.cat(order[25:])), "epochs differ"
    assert not torch.equal(order[0], rows_of_step(0, 4, 100, seed=4)), "seeds differ"


def test_the_order_is_the_same_on_every_machine():
    """Fixed numbers: a change here changes every run that anyone wants to repeat."""
    assert rows_of_step(0, 8, 1000, seed=0).tolist() == [464, 59, 729, 156, 158, 282, 570, 23]


def test_tokens_are_made_once_and_keep_their_side(small, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    corpus = read_corpus(small().data)
    tokenizer = load_tokenizer(texts(corpus.train), 512)
    first = tokenise(corpus, tokenizer)
    monkeypatch.setattr(tokens, "_encode", None)
    again = tokenise(corpus, tokenizer)
    for side, originals in (("train", corpus.train), ("held_out", corpus.held_out)):
        for ids, same, original in zip(getattr(first, side), getattr(again, side), originals, strict=True):
            assert torch.equal(ids, same)
            assert ids[0] == ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False) == original.text


def test_unigram_cross_entropy_is_the_hand_computed_one():
    """Counts of training tokens a, b: 3 and 1 (first tokens don't count), add one, V = 3; held out: a, c."""
    found = TokenisedCorpus(
        train=DocumentTokens.of([torch.tensor([2, 0, 0, 1]), torch.tensor([2, 0])]),
        held_out=DocumentTokens.of([torch.tensor([2, 0, 2])]),
    )
    expected = -(math.log(4 / 7) + math.log(1 / 7)) / 2
    assert unigram_cross_entropy(found, 3) == pytest.approx(expected, rel=1e-12)
