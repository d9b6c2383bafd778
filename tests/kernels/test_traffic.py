"""Bytes of logits moved, counted address by address in the interpreter, against what each kernel file states."""

import numpy as np
import pytest
import torch

from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce
from mtp_ce.kernels import backward, forward, forward_backward, scale, shards
from mtp_ce.kernels.results import RowResults, Rows
from mtp_ce.options import LossOptions, VocabShard

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counts in the interpreter, which a GPU run leaves off"
)


class Meter:
    """Every address that kernels load and store, with repeats."""

    def __init__(self) -> None:
        self.loaded: list[np.ndarray] = []
        self.stored: list[np.ndarray] = []

    def loads_of(self, tensor: torch.Tensor) -> np.ndarray:
        """How often each element was loaded, in the tensor's shape."""
        return self._count(self.loaded, tensor)

    def stores_to(self, tensor: torch.Tensor) -> np.ndarray:
        """How often each element was stored, in the tensor's shape."""
        return self._count(self.stored, tensor)

    @staticmethod
    def _count(addresses: list[np.ndarray], tensor: torch.Tensor) -> np.ndarray:
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        offsets = np.concatenate(addresses).astype(np.int64) - tensor.data_ptr()
        offsets = offsets[(offsets >= 0) & (offsets < span * tensor.element_size())]
        assert not (offsets % tensor.element_size()).any()
        counts = np.bincount(offsets // tensor.element_size(), minlength=span)
        strided = torch.from_numpy(counts).as_strided(tensor.shape, tensor.stride()).numpy()
        assert strided.sum() == counts.sum(), "an access between the rows"
        return strided


@pytest.fixture
def meter(monkeypatch):
    """A meter on every load and store of the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    meter, load, store = (
        Meter(),
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def masked_load(self, ptrs, mask, *rest):
        meter.loaded.append(np.asarray(ptrs.data)[np.asarray(mask.data, dtype=bool)].ravel())
        return load(self, ptrs, mask, *rest)

    def masked_store(self, ptrs, value, mask, *rest):
        meter.stored.append(np.asarray(ptrs.data)[np.asarray(mask.data, dtype=bool)].ravel())
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", masked_store)
    return meter


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("V", [5, 1000, 1003, 9001, 30011])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("head_reduction", ["live", "target"])
def test_each_valid_logit_is_read_once_a_pass_and_each_gradient_written_once(
    meter, monkeypatch, V, dtype, inplace, head_reduction
):
    """Masked rows are not read at all; the counts agree with `traffic` to the byte."""
    B, S, H = 2, 5, 3
    labels = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(V))
    labels[0, 2] = -100
    token_weights = torch.ones(B, S)
    token_weights[1, 0] = 0
    document_ids = torch.tensor([[0, 0, 0, 1, 1], [0] * 5])
    logits = torch.randn(B, S, H, V).to(dtype).requires_grad_()
    gradients = []
    launch = backward.launch_backward

    def keep_gradient(d_loss, logits, d_logits, *rest, **options):
        gradients.extend(d_logits)
        return launch(d_loss, logits, d_logits, *rest, **options)

    monkeypatch.setattr(backward, "launch_backward", keep_gradient)
    given = logits * 1
    loss, stats = weighted_mtp_ce(
        given, labels, token_weights,
        document_ids=document_ids, head_reduction=head_reduction, inplace_backward=inplace, impl="triton",
        return_stats=True,
    )  # fmt: skip
    read = (stats.live & (token_weights != 0)[:, :, None]).numpy()
    assert 0 < read.sum() < read.size
    once = np.broadcast_to(read[..., None], given.shape)
    loads = meter.loads_of(given)
    assert (loads == once).all()
    stated, _ = forward.traffic(int(read.sum()), B * S, H, V, given.element_size())
    assert loads.sum() * given.element_size() == stated

    meter.loaded.clear()
    meter.stored.clear()
    loss.backward()
    loads, stores = meter.loads_of(given), meter.stores_to(gradients[0])
    assert (gradients[0].data_ptr() == given.data_ptr()) == inplace
    assert (loads == once).all()
    assert (stores == 1).all()
    stated = backward.traffic(int(read.sum()), B * S * H, V, given.element_size())
    assert (loads.sum() * given.element_size(), stores.sum() * given.element_size()) == stated


def test_forward_writes_what_it_states(meter):
    B, S, H, V = 2, 3, 2, 100
    weighted_mtp_ce(torch.randn(B, S, H, V), torch.randint(V, (B, S)), impl="triton")
    results = 8  # loss and factor, of the reduction over positions
    stored = sum(addresses.size for addresses in meter.stored)
    _, stated = forward.traffic(0, B * S, H, V, 4)
    one_byte = B * S * H
    assert (stored - one_byte) * 4 + one_byte == stated + results


class Chunks:
    """The arguments of each launch over a chunk, and what the meter counted of it."""

    def __init__(self, meter: Meter, monkeypatch) -> None:
        self.launches: list[dict] = []
        launch = forward_backward.launch_forward_backward

        def counted(logits, rows, results, options, *, gradient, terms):
            meter.loaded.clear()
            meter.stored.clear()
            launch(logits, rows, results, options, gradient=gradient, terms=terms)
            loads, stores = meter.loads_of(logits), meter.stores_to(logits)
            read = rows.row_mask.numpy().copy()
            self.launches.append({
                "read": read, "moves": (rows.coefficient != 0).numpy() & read, "gradient": gradient,
                "loads": loads, "stores": stores, "itemsize": logits.element_size(),
            })  # fmt: skip

        monkeypatch.setattr(forward_backward, "launch_forward_backward", counted)


@pytest.fixture
def chunks(meter, monkeypatch) -> Chunks:
    """The launches of a call of the linear path."""
    return Chunks(meter, monkeypatch)


def linear_batch(V, dtype):
    """Rows that are dead for their label, their document and their weight."""
    generator = torch.Generator().manual_seed(V)
    labels = torch.randint(V, (2, 5), generator=generator)
    labels[0, 2] = -100
    token_weights = torch.ones(2, 5)
    token_weights[1, 0] = 0
    document_ids = torch.tensor([[0, 0, 0, 1, 1], [0] * 5])
    hidden = torch.randn(2, 5, 3, 4, generator=generator).to(dtype).requires_grad_()
    unembed = torch.randn(V, 4, generator=generator).to(dtype).requires_grad_()
    return hidden, unembed, labels, token_weights, document_ids


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("V", [5, 1000, 1003, 9001])
@pytest.mark.parametrize("drop", [True, False])
def test_each_valid_logit_of_a_chunk_is_read_twice_and_each_gradient_written_once(chunks, V, dtype, drop):
    """Masked rows are written, never read, and not there at all where they are left out; as `traffic` says."""
    hidden, unembed, labels, token_weights, document_ids = linear_batch(V, dtype)
    _, stats = weighted_mtp_linear_ce(
        hidden, unembed, labels, token_weights,
        document_ids=document_ids, drop_dead_rows=drop, chunk_bytes=7 * V * dtype.itemsize, impl="triton",
        return_stats=True,
    )  # fmt: skip
    live = int((stats.top1 >= 0).sum())
    assert 0 < live < stats.live.numel()
    assert len(chunks.launches) == -(-(live if drop else stats.live.numel()) // 7)
    assert sum(one["read"].sum() for one in chunks.launches) == live
    for one in chunks.launches:
        assert one["gradient"]
        assert (one["loads"] == 2 * one["read"][:, None]).all()
        assert (one["stores"] == 1).all()
        stated = forward_backward.traffic(int(one["read"].sum()), len(one["read"]), V, one["itemsize"], True)
        assert (one["loads"].sum() * one["itemsize"], one["stores"].sum() * one["itemsize"]) == stated
    if drop:
        assert all(one["read"].all() for one in chunks.launches)


@pytest.mark.parametrize("V", [5, 1003])
@pytest.mark.parametrize("wanted", ["no_grad", "none"])
def test_forward_alone_reads_a_chunk_once_and_writes_no_gradient(chunks, V, wanted):
    """Also the forward of reduction="none", whose backward reads twice what it computes again."""
    hidden, unembed, labels, token_weights, document_ids = linear_batch(V, torch.float32)
    with torch.set_grad_enabled(wanted == "none"):
        loss = weighted_mtp_linear_ce(
            hidden, unembed, labels, token_weights,
            document_ids=document_ids, drop_dead_rows=False, reduction="none", impl="triton",
        )  # fmt: skip
    (one,) = chunks.launches
    assert not one["gradient"]
    assert (one["loads"] == 1 * one["read"][:, None]).all()
    assert not one["stores"].any()
    rows, live = len(one["read"]), int(one["read"].sum())
    assert (one["loads"].sum() * 4, 0) == forward_backward.traffic(live, rows, V, 4, False)
    if wanted == "none":
        upstream = torch.ones_like(loss)
        upstream[0, 0] = 0.0  # its rows are dead in backward
        loss.backward(upstream)
        again = chunks.launches[1]
        assert again["gradient"]
        assert 0 < again["read"].sum() < live
        assert (again["loads"] == 2 * again["read"][:, None]).all()
        assert (again["stores"] == 1).all()


def test_a_row_that_is_read_for_its_weight_alone_is_read_once(chunks):
    """Its loss is the gradient of its weight; its own gradient is known to be 0."""
    hidden, unembed, labels, token_weights, document_ids = linear_batch(1003, torch.float32)
    weighted_mtp_linear_ce(
        hidden, unembed, labels, token_weights.requires_grad_(),
        document_ids=document_ids, drop_dead_rows=False, impl="triton",
    )  # fmt: skip
    (one,) = chunks.launches
    assert (one["read"] & ~one["moves"]).any()
    assert (one["loads"] == (one["read"].astype(int) + one["moves"])[:, None]).all()
    assert (one["stores"] == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [1.0, 0.37, float("nan")])
@pytest.mark.parametrize("N", [1, 4096, 3 * 4096 + 5])
def test_a_scaled_gradient_is_read_and_written_once_and_not_at_all_under_a_scale_of_1(meter, N, dtype, factor):
    """The product in fp32, rounded once; bit for bit what torch computes."""
    x = torch.randn(N, generator=torch.Generator().manual_seed(N)).to(dtype)
    expected = (x.float() * factor).to(dtype)
    scale.launch_scale(x, torch.tensor(factor))
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)
    loads, stores = meter.loads_of(x), meter.stores_to(x) if meter.stored else np.zeros(N)
    moved = loads.sum() * dtype.itemsize, stores.sum() * dtype.itemsize
    assert moved == scale.traffic(N, dtype.itemsize, factor)
    assert factor == 1 or ((loads == 1).all() and (stores == 1).all())


@pytest.mark.parametrize("gradient", [True, False])
def test_a_rank_reads_its_entries_once_a_pass_and_has_the_results_of_one_process(meter, gradient):
    """Both kernels of a chunk on one rank that holds all entries; a masked row is not read."""
    R, V = 5, 1003
    generator = torch.Generator().manual_seed(V)
    whole = torch.randn(R, V, generator=generator)
    mask = torch.tensor([True, True, False, True, True])
    coefficient = torch.rand(R, generator=generator) * mask
    rows = Rows(torch.randint(V, (R,), generator=generator, dtype=torch.int32), coefficient, mask)
    options = LossOptions(label_smoothing=0.1, z_loss=1e-3)

    def results() -> RowResults:
        return RowResults(*(torch.full((R,), float("nan")) for _ in range(3)), torch.zeros(R, dtype=torch.int32))

    expected, logits_of_one = results(), whole.clone()
    forward_backward.launch_forward_backward(logits_of_one, rows, expected, options, gradient=gradient)
    got, logits, sent = results(), whole.clone(), []

    def gather(partials, **wanted):
        sent.append(wanted)
        return partials[:, :, None].clone()

    meter.loaded.clear()
    meter.stored.clear()
    how = {"gradient": gradient, "shard": VocabShard(V, 0, 1, "no group"), "gather": gather}
    shards.launch_shard(logits, rows, got, options, **how)
    assert sent == [{"smooth": True, "with_top1": True}]
    for ours, theirs in zip((*got, logits), (*expected, logits_of_one), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    loads, stores = meter.loads_of(logits), meter.stores_to(logits)
    read, written = shards.traffic(int(mask.sum()), R, V, 4, gradient)
    assert (loads.sum() * 4, stores.sum() * 4) == (read, written)
    assert not loads[2].any()
