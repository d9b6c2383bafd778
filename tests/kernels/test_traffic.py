"""Bytes of logits moved, counted address by address in the interpreter, against what each kernel file states."""

import numpy as np
import pytest
import torch

from mtp_ce import weighted_mtp_ce
from mtp_ce.kernels import backward, forward

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counts in the interpreter, which a GPU run leaves off"
)


class Meter:
    """Every address that kernels load and store, with repeats."""

    def __init__(self) -> None:
        self.loaded: list[np.ndarray] = []
        self.stored: list[np.ndarray] = []

    def loads_of(self, tensor: torch.Tensor) -> np.ndarray:
        """How often each element of a dense tensor was loaded, in its shape."""
        return self._count(self.loaded, tensor)

    def stores_to(self, tensor: torch.Tensor) -> np.ndarray:
        """How often each element of a dense tensor was stored, in its shape."""
        return self._count(self.stored, tensor)

    @staticmethod
    def _count(addresses: list[np.ndarray], tensor: torch.Tensor) -> np.ndarray:
        offsets = np.concatenate(addresses).astype(np.int64) - tensor.data_ptr()
        offsets = offsets[(offsets >= 0) & (offsets < tensor.numel() * tensor.element_size())]
        assert not (offsets % tensor.element_size()).any()
        counts = np.bincount(offsets // tensor.element_size(), minlength=tensor.numel())
        strided = torch.from_numpy(counts).as_strided(tensor.shape, tensor.stride())
        return strided.numpy()


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("V", [5, 1000, 1003, 9001])
@pytest.mark.parametrize("inplace", [False, True])
def test_each_live_logit_is_read_once_a_pass_and_each_gradient_written_once(meter, monkeypatch, V, dtype, inplace):
    """Dead rows are not read at all; the counts agree with `traffic` to the byte."""
    B, S, H = 2, 5, 3
    labels = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(V))
    labels[0, 2] = -100
    token_weights = torch.ones(B, S)
    token_weights[1, 0] = 0
    document_ids = torch.tensor([[0, 0, 0, 1, 1], [0] * 5])
    logits = torch.randn(B, S, H, V).to(dtype).requires_grad_()
    gradients = []
    launch = backward.launch_backward

    def keep_gradient(d_loss, heads, d_heads, *rest, **options):
        gradients.append(d_heads[0].as_strided(logits.shape, logits.stride()))
        return launch(d_loss, heads, d_heads, *rest, **options)

    monkeypatch.setattr(backward, "launch_backward", keep_gradient)
    given = logits * 1
    loss, stats = weighted_mtp_ce(
        given, labels, token_weights,
        document_ids=document_ids, inplace_backward=inplace, impl="triton", return_stats=True,
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
