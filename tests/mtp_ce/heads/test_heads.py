"""MTPHeads: neutral at the start, independent of each other, the same after a save."""

from __future__ import annotations

import json

import pytest
import torch

from mtp_ce import MTPHeads


def trained(hidden_size: int = 16, horizon: int = 4) -> MTPHeads:
    """Heads that differ."""
    torch.manual_seed(0)
    heads = MTPHeads(hidden_size, horizon)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_()
    return heads


def test_at_initialisation_every_head_is_the_trunks_hidden_state():
    hidden = torch.randn(2, 5, 16)
    heads = MTPHeads(16, 4)(hidden)
    assert len(heads) == 4
    for head in heads:
        assert torch.equal(head, hidden)


def test_head_0_is_the_hidden_state_itself_after_training_too():
    hidden = torch.randn(2, 5, 16)
    assert trained()(hidden)[0] is hidden


def test_an_extra_head_is_the_residual_block_of_medusa():
    heads, hidden = trained(), torch.randn(2, 5, 16)
    for h, block in enumerate(heads.blocks, start=1):
        moved = hidden @ block.weight.T + block.bias
        torch.testing.assert_close(heads(hidden)[h], hidden + moved * torch.sigmoid(moved))


def test_zero_is_no_saddle_every_head_learns_from_the_first_step():
    heads = MTPHeads(16, 4)
    outputs = heads(torch.randn(2, 5, 16))
    torch.stack(outputs).square().sum().backward()
    for parameter in heads.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_a_heads_loss_moves_no_other_head():
    heads = trained()
    heads(torch.randn(2, 5, 16))[2].sum().backward()
    assert [block.weight.grad is not None for block in heads.blocks] == [False, True, False]


def test_horizon_1_has_no_parameters():
    heads = MTPHeads(16, 1)
    assert list(heads.parameters()) == []
    assert len(heads(torch.randn(1, 2, 16))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_the_same_bit_for_bit_after_a_save(dtype, tmp_path):
    heads = trained().to(dtype)
    heads.save_pretrained(tmp_path)
    loaded = MTPHeads.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "mtp_heads.json").read_text()) == {
        "kind": "residual",
        "hidden_size": 16,
        "horizon": 4,
    }
    assert loaded.state_dict().keys() == heads.state_dict().keys()
    for name, tensor in heads.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    hidden = torch.randn(2, 5, 16, dtype=dtype)
    for one, other in zip(heads(hidden), loaded(hidden), strict=True):
        assert torch.equal(one, other)


def test_heads_without_extra_ones_survive_a_save(tmp_path):
    MTPHeads(16, 1).save_pretrained(tmp_path)
    assert MTPHeads.from_pretrained(tmp_path).horizon == 1


def test_files_that_disagree_are_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "mtp_heads.json").read_text())
    (tmp_path / "mtp_heads.json").write_text(json.dumps({**config, "horizon": 5}))
    with pytest.raises(ValueError, match=r"has 3 extra heads, and mtp_heads\.json beside it has horizon 5"):
        MTPHeads.from_pretrained(tmp_path)


def test_heads_made_on_the_meta_device_are_neutral_once_they_are_filled():
    with torch.device("meta"):
        heads = MTPHeads(16, 3)
    heads.to_empty(device="cpu")
    heads.reset_parameters()
    hidden = torch.randn(1, 2, 16)
    assert all(torch.equal(head, hidden) for head in heads(hidden))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 4), "hidden_size is 0"), ((16, 0), "horizon is 0"), ((16, 4, "layer"), "kind is 'layer'")],
)
def test_a_wrong_argument_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        MTPHeads(*arguments)
