"""A training step with four heads, by each way from hidden states to the loss.

    pytest benchmarks --benchmark-only -k training_step

    hidden_h    MTPWrapper with residual heads around a Llama of random weights             H x [B, S, D]
    loss        1/N sum_{b,t} w/K sum_h ce, of random tokens and weights of positions       []

eager               the logits of all heads, H x [B, S, V]; a loop over the heads, F.cross_entropy in fp32, weighted
logits              the logits of all heads; weighted_mtp_ce
logits in place     the same; the gradient overwrites the logits
linear              the wrapper's forward, which is weighted_mtp_linear_ce of its hidden states: no logits

A step is forward, loss, backward, AdamW and zero_grad. Weights, gradients and the states of AdamW have the dtype of the
shape; nothing is compiled, and no activation is recomputed. A path is timed where its loss and gradients pass the check
against the float64 oracle on the same hidden states. Without transformers the test is skipped.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import eager, measure, oracle, results
from benchmarks.measure import DEVICE, HAS_GPU, Session
from benchmarks.shapes import Inputs, Shape
from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce

ROUNDS = 20 if HAS_GPU else 6
# So small that the model learns nothing while it is timed, and that is no special case of the optimizer.
LEARNING_RATE = 1e-6


class Size(NamedTuple):
    """A model; the B and S of its shape are the micro-batch."""

    name: str
    shape: Shape
    layers: int
    attention_heads: int
    kv_heads: int
    intermediate: int

    def config(self) -> Any:
        """Return the configuration of the trunk."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.shape.V, hidden_size=self.shape.D, max_position_embeddings=self.shape.S,
            intermediate_size=self.intermediate, num_hidden_layers=self.layers, tie_word_embeddings=True,
            num_attention_heads=self.attention_heads, num_key_value_heads=self.kv_heads,
        )  # fmt: skip


SIZES = {
    "cuda": Size("Llama-3.2 1B", Shape("linear", "Llama-3.2 1B", 2048, 4, "bf16", 2048, B=2), 16, 32, 8, 8192),
    "cpu": Size("a small Llama", Shape("linear", "Llama-2 7B", 256, 4, "fp32", 256), 2, 4, 2, 768),
}
Loss = Callable[..., Tensor]  # (H x hidden [B, S, D], unembed [V, D], tokens [B, S], token_weights [B, S]) -> []


def _logits(hidden: Sequence[Tensor], unembed: Tensor) -> list[Tensor]:
    return [F.linear(x, unembed) for x in hidden]


def eager_loss(hidden: Sequence[Tensor], unembed: Tensor, tokens: Tensor, token_weights: Tensor) -> Tensor:
    """The usual loop over the logits of the heads."""
    logits = _logits(hidden, unembed)
    loss: Tensor = eager.loop_over_heads(lambda h, end: logits[h][:, :end], len(logits), tokens, token_weights, None)
    return loss


def logits_loss(
    hidden: Sequence[Tensor], unembed: Tensor, tokens: Tensor, token_weights: Tensor, inplace: bool = False
) -> Tensor:
    """This project, of logits."""
    return weighted_mtp_ce(_logits(hidden, unembed), tokens, token_weights, inplace_backward=inplace)


PATHS: dict[str, Loss] = {
    "eager": eager_loss,
    "logits": logits_loss,
    "logits in place": partial(logits_loss, inplace=True),
    "linear": weighted_mtp_linear_ce,
}


class Training:
    """A model with its optimizer and one batch, shared by all paths: the values of its weights change no time."""

    def __init__(self, size: Size) -> None:
        from transformers import AutoModelForCausalLM

        from mtp_ce import MTPWrapper

        self.size, shape = size, size.shape
        torch.manual_seed(0)
        with DEVICE:
            trunk = AutoModelForCausalLM.from_config(size.config(), dtype=shape.torch_dtype)
            self.model = MTPWrapper(trunk, shape.H, heads="residual", head_reduction="live").train()
            # Residual heads start at zero, where all heads are equal: exchanged heads would pass the check.
            for parameter in self.model.heads.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            self.tokens = torch.randint(shape.V, (shape.B, shape.S))
            self.token_weights = torch.rand(shape.B, shape.S) + 0.1
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=HAS_GPU or None)
        # The first step makes the optimizer's states.
        self.step("linear")

    @property
    def unembed(self) -> Tensor:
        """The weight of the output layer [V, D]."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def hidden(self) -> list[Tensor]:
        """Return H hidden states [B, S, D]."""
        states: list[Tensor] = self.model.head_hidden_states(input_ids=self.tokens)
        return states

    def loss(self, path: str) -> Tensor:
        """Return the loss of the batch, with its graph."""
        if path == "linear":
            weights = {"token_weights": self.token_weights, "weight_alignment": "position"}
            loss: Tensor = self.model(self.tokens, labels=self.tokens, **weights).loss
            return loss
        return PATHS[path](self.hidden(), self.unembed, self.tokens, self.token_weights)

    def step(self, path: str) -> None:
        """Train one step."""
        self.loss(path).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def results(self, path: str) -> oracle.Results:
        """Return the loss of a step, and the gradients of hidden [B, S, H, D] and unembed; no update."""
        with torch.no_grad():
            loss = self.loss(path)
            states = self.hidden()
        leaves = [x.detach().requires_grad_() for x in states]
        unembed = self.unembed.detach().requires_grad_()
        inputs = self.tokens, self.token_weights
        *d_hidden, d_unembed = torch.autograd.grad(PATHS[path](leaves, unembed, *inputs), [*leaves, unembed])
        return {"loss": loss, "d_hidden": torch.stack(d_hidden, dim=2), "d_unembed": d_unembed}

    def errors(self, path: str) -> dict[str, oracle.Error]:
        """Return the errors against the oracle, on the hidden states of the batch."""
        with torch.no_grad():
            values = {"hidden": torch.stack(self.hidden(), dim=2), "unembed": self.unembed.detach()}
        inputs = Inputs("linear", values, self.tokens, self.token_weights, None)
        # Autograd adds the heads' gradients of unembed in their dtype, except on the linear path.
        unit_of = torch.float32 if path == "linear" else self.size.shape.torch_dtype
        return oracle.check(oracle.find_truth(self.size.shape, inputs), self.results(path), unit_of)

    def described(self) -> dict[str, Any]:
        """Return the model and batch for the results file; held_bytes are weights and optimizer states."""
        states = [state for by_name in self.optimizer.state.values() for state in by_name.values()]
        held = [*self.model.parameters(), *(state for state in states if isinstance(state, Tensor))]
        shape = self.size.shape
        return {
            "model": self.size.name, "layers": self.size.layers, "V": shape.V, "D": shape.D, "H": shape.H,
            "S": shape.S, "B": shape.B, "dtype": shape.dtype,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "held_bytes": sum(tensor.numel() * tensor.element_size() for tensor in held),
        }  # fmt: skip


@pytest.fixture(scope="module")
def training() -> Training:
    """The model that all paths share."""
    pytest.importorskip("transformers")
    return Training(SIZES[DEVICE.type])


@pytest.mark.benchmark(group="training step", timer=measure.clock)
@pytest.mark.parametrize("path", PATHS)
def test_training_step(
    benchmark: BenchmarkFixture,
    session: Session,
    training: Training,
    path: str,
    record_property: Callable[[str, object], None],
) -> None:
    """One path."""
    if path in [step["provider"] for step in session.run["steps"]]:
        pytest.skip("in the resumed run")
    session.skip_after_deadline()
    for name, error in training.errors(path).items():
        assert error.acceptable, f"{path}: error of {name} {error.distance:.3g}, allowed {error.allowed:.3g}"
    described = training.described()
    before = measure.reset_peak()
    training.step(path)
    peak_bytes = measure.peak() - before + described["held_bytes"]
    others = measure.others_cpu()
    benchmark.pedantic(training.step, args=(path,), rounds=ROUNDS)
    if benchmark.disabled:
        return
    timing = results.timing(benchmark.stats.stats.data, None)
    rate = round(training.tokens.numel() / timing["p50_ms"] * 1e3, 1)
    figures = {name: timing[name] for name in ("rounds", "p20_ms", "p50_ms", "p80_ms")}
    session.run["steps"].append({
        "provider": path, "shape": described, **figures, "tokens_per_s": rate, "peak_bytes": peak_bytes,
        "others_cpu": others(),
    })  # fmt: skip
    session.save()
    record_property("measured", f"{rate:,.0f} tokens/s")
