"""The oracle itself: against the formula in plain Python, and against transformers' own causal loss."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mtp_ce import weighted_mtp_ce


def by_the_formula(logits: Tensor, labels: Tensor, weights: Tensor | None, options: dict) -> SimpleNamespace:
    """Section 2 of the design, position by position, with Python's own floats."""
    B, S, H, V = logits.shape
    option = {"shift": 1, "ignore_index": -100, "softcap": None, "label_smoothing": 0.0, "z_loss": 0.0, **options}
    lens = option.get("seq_lens")
    docs = option.get("document_ids")
    a = option.get("head_weights")
    a = [1.0] * H if a is None else a.tolist()
    result = SimpleNamespace(ce={}, live={}, lse={}, top1={}, per_position=[[0.0] * S for _ in range(B)], positions=0)
    for b in range(B):
        for t in range(S):
            for h in range(H):
                target = t + option["shift"] + h
                live = target < (S if lens is None else min(S, int(lens[b])))
                live = live and int(labels[b, target]) != option["ignore_index"]
                result.live[b, t, h] = live and (docs is None or int(docs[b, target]) == int(docs[b, t]))
        # The heads that predict token j, each from its position.
        predicting = {
            j: [h for h in range(H) if result.live.get((b, j - option["shift"] - h, h), False)] for j in range(S)
        }
        by_token = option.get("head_reduction") == "target"
        result.positions += sum(map(bool, predicting.values())) if by_token else 0
        for t in range(S):
            terms, total, alive = 0.0, 0.0, 0
            for h in range(H):
                target, live = t + option["shift"] + h, result.live[b, t, h]
                result.ce[b, t, h], result.lse[b, t, h], result.top1[b, t, h] = 0.0, 0.0, -1
                if not live:
                    continue
                alive += 1
                total += a[h]
                if weights is None:
                    w = 1.0
                elif weights.dim() == 3:
                    w = float(weights[b, t, h])
                else:
                    w = float(weights[b, target if option.get("weight_alignment") == "target" else t])
                if w == 0 or a[h] == 0:
                    continue
                z = logits[b, t, h].tolist()
                if option["softcap"] is not None:
                    z = [option["softcap"] * math.tanh(x / option["softcap"]) for x in z]
                label = z[int(labels[b, target])]
                lse = max(z) + math.log(math.fsum(math.exp(x - max(z)) for x in z))
                e = option["label_smoothing"]
                loss = lse - (1 - e) * label - e * math.fsum(z) / V + option["z_loss"] * lse**2
                terms += a[h] * w * loss / (sum(a[i] for i in predicting[target]) if by_token else 1.0)
                result.ce[b, t, h], result.lse[b, t, h], result.top1[b, t, h] = lse - label, lse, z.index(max(z))
            result.positions += alive > 0 and not by_token
            divisor = {"horizon": H, "target": 1.0}.get(option.get("head_reduction"), total)
            result.per_position[b][t] = terms / divisor if divisor else 0.0
    reduction, scale = option.get("reduction", "mean"), option.get("loss_scale", 1.0)
    everything = math.fsum(x for row in result.per_position for x in row)
    if reduction == "none":
        result.loss = [[scale * x for x in row] for row in result.per_position]
    elif reduction == "sum":
        result.loss = scale * everything
    else:
        by = option.get("normalizer") or result.positions
        result.loss = scale * everything / by if result.positions else 0.0
    return result


def draw_case(seed: int) -> tuple[Tensor, Tensor, Tensor | None, dict]:
    """A tiny case that mixes the options."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    B, S, H, V = rng.randint(1, 2), rng.randint(1, 5), rng.randint(1, 4), rng.randint(1, 5)
    logits = torch.randn(B, S, H, V, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, V, (B, S), generator=generator)
    options: dict = {"shift": rng.randint(0, 3), "reduction": rng.choice(["mean", "sum", "none"])}
    options["loss_scale"] = rng.choice([1.0, -0.5])
    if rng.random() < 0.5:
        options["ignore_index"] = rng.choice([-100, 0])
        labels[torch.rand(B, S, generator=generator) < 0.3] = options["ignore_index"]
    if rng.random() < 0.4:
        options["seq_lens"] = torch.randint(0, S + 1, (B,), generator=generator)
    if rng.random() < 0.4:
        options["document_ids"] = torch.randint(0, 2, (B, S), generator=generator)
    if rng.random() < 0.3:
        options["softcap"] = rng.choice([0.5, 20.0])
    if rng.random() < 0.3:
        options["z_loss"] = 0.1
    if rng.random() < 0.3:
        options["label_smoothing"] = 0.2
    heads = rng.random()
    if heads < 0.2:
        options["head_reduction"] = "horizon"
    elif heads < 0.5:
        options["head_reduction"] = "target"
    if 0.35 < heads < 0.7:
        options["head_weights"] = torch.tensor([1.0, 0.0, 0.5, 3.0][:H], dtype=torch.float64)
    if options["reduction"] == "mean" and rng.random() < 0.3:
        options["normalizer"] = 7.0
    weights = None
    form = rng.random()
    if form < 0.7:
        weights = torch.randn((B, S, H) if form < 0.2 else (B, S), generator=generator, dtype=torch.float64)
        weights[torch.rand(weights.shape, generator=generator) < 0.2] = 0.0
        if weights.dim() == 2:
            options["weight_alignment"] = rng.choice(["position", "target"])
    return logits, labels, weights, options


@pytest.mark.parametrize("seed", range(60))
def test_the_oracle_is_the_formula(seed: int) -> None:
    """Triple loop over b, t, h in Python floats against the eager oracle in float64."""
    logits, labels, weights, options = draw_case(seed)
    wanted = by_the_formula(logits, labels, weights, options)
    loss, stats = weighted_mtp_ce(logits, labels, weights, impl="reference", return_stats=True, **options)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(loss, torch.tensor(wanted.loss, dtype=torch.float64), **close)
    for b, t, h in wanted.ce:
        assert bool(stats.live[b, t, h]) == wanted.live[b, t, h], (b, t, h)
        assert int(stats.top1[b, t, h]) == wanted.top1[b, t, h], (b, t, h)
        assert math.isclose(float(stats.ce[b, t, h]), wanted.ce[b, t, h], rel_tol=1e-12, abs_tol=1e-12), (b, t, h)
        assert math.isclose(float(stats.lse[b, t, h]), wanted.lse[b, t, h], rel_tol=1e-12, abs_tol=1e-12), (b, t, h)


def test_a_loss_worked_by_hand() -> None:
    """Two tokens, two heads, three classes: one valid row, whose probabilities are 1/4, 1/4, 1/2."""
    logits = torch.tensor([1.0, 1.0, 2.0]).log().expand(1, 2, 2, 3)
    labels = torch.tensor([[0, 2]])
    for impl in ("reference", "cpu", "triton" if not torch.cuda.is_available() else "cpu"):
        loss = weighted_mtp_ce(logits, labels, torch.tensor([[3.0, 5.0]]), impl=impl)
        assert math.isclose(loss.item(), 3 * math.log(2), rel_tol=1e-6)
        by_target = weighted_mtp_ce(logits, labels, torch.tensor([[3.0, 5.0]]), weight_alignment="target", impl=impl)
        assert math.isclose(by_target.item(), 5 * math.log(2), rel_tol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_one_head_of_weight_one_is_the_causal_loss_of_transformers(impl, device, draw) -> None:
    """Loss and gradient, with labels unshifted and -100 among them, to three times the error of transformers."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    V = 507
    labels = draw.integers(V, 2, 9)
    labels[0, :3] = labels[1, -2:] = -100
    x = draw.normal(2, 9, V, scale=4).requires_grad_()
    y = x.detach().clone().requires_grad_()
    exact = x.detach().double().requires_grad_()

    ours = weighted_mtp_ce(x, labels, impl=impl)
    theirs = ForCausalLMLoss(y, labels, V)
    # transformers computes in fp32 whatever it is given, so the truth comes from torch's own cross entropy.
    truth = torch.nn.functional.cross_entropy(exact[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for loss in (ours, theirs, truth):
        loss.backward()
    for mine, their, true in ((ours, theirs, truth), (x.grad, y.grad, exact.grad)):
        error, peer = (float((value.detach().double() - true.detach()).abs().max()) for value in (mine, their))
        assert error <= 3 * peer + 4 * torch.finfo(torch.float32).eps * float(true.detach().abs().max())


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_one_head_of_weight_one_is_the_loss_that_a_llama_reports(impl, device, draw) -> None:
    """`labels` are `input_ids`, unshifted: shift=1 is the convention of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    input_ids = draw.integers(97, 2, 8)
    output = model(input_ids=input_ids, labels=input_ids)
    ours = weighted_mtp_ce(output.logits, input_ids, impl=impl)
    torch.testing.assert_close(ours, output.loss, rtol=1e-6, atol=0)
