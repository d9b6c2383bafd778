"""One step of a training with four heads, and the four ways that its loss can go.

    hidden_h    MTPWrapper with residual heads around a Llama of random weights             H x [B, S, D]
    loss        1/N sum_{b,t} w/K sum_h ce, of random tokens and weights of positions       []

eager               the logits of all heads, H x [B, S, V]; a loop over the heads, F.cross_entropy in fp32, weighted
logits              the logits of all heads; weighted_mtp_ce
logits in place     likewise; the gradient overwrites the logits
linear              the forward of the wrapper, which is weighted_mtp_linear_ce of its hidden states: no logits

A step is forward, loss, backward, AdamW and zero_grad. Weights, gradients and the states of AdamW all have the dtype of
the shape; nothing is compiled, and no activation is computed twice.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import eager
from benchmarks.clock import DEVICE, HAS_GPU, clock
from benchmarks.oracle import Results
from benchmarks.provider import AbsentError
from benchmarks.shapes import Shape
from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce


class Size(NamedTuple):
    """A model, and with the B of its shape the micro-batch that it is to be timed at."""

    name: str
    shape: Shape
    layers: int
    attention_heads: int
    kv_heads: int
    intermediate: int


SIZES = {
    "cuda": Size("Llama-3.2 1B", Shape("linear", "Llama-3.2 1B", 2048, 4, "bf16", 2048, B=2), 16, 32, 8, 8192),
    "cpu": Size("a small Llama", Shape("linear", "Llama-2 7B", 256, 4, "fp32", 256), 2, 4, 2, 768),
}
# Too small to teach the model its random tokens while it is timed, and no special case of the optimizer.
LEARNING_RATE = 1e-6


class Batch(NamedTuple):
    """A micro-batch."""

    tokens: Tensor  # [B, S], labels too
    token_weights: Tensor  # [B, S]


class Path(NamedTuple):
    """A way from the hidden states of all heads to the loss."""

    name: str
    loss: Callable[..., Tensor]  # (H x hidden [B, S, D], unembed [V, D], tokens, token_weights) -> []
    # Autograd adds the heads' gradients of unembed up in its dtype.
    rounds: bool = True


def _logits(hidden: Sequence[Tensor], unembed: Tensor) -> list[Tensor]:
    return [F.linear(x, unembed) for x in hidden]


def eager_loss(hidden: Sequence[Tensor], unembed: Tensor, tokens: Tensor, token_weights: Tensor) -> Tensor:
    """What people write when a model gives the logits of its heads."""
    logits = _logits(hidden, unembed)
    return eager.loop_over_heads(lambda h, end: logits[h][:, :end], len(logits), tokens, token_weights, None)


def logits_loss(
    hidden: Sequence[Tensor], unembed: Tensor, tokens: Tensor, token_weights: Tensor, inplace: bool = False
) -> Tensor:
    """This project, of logits."""
    return weighted_mtp_ce(_logits(hidden, unembed), tokens, token_weights, inplace_backward=inplace)


LINEAR = Path("linear", weighted_mtp_linear_ce, rounds=False)
PATHS = (
    Path("eager", eager_loss),
    Path("logits", logits_loss),
    Path("logits in place", partial(logits_loss, inplace=True)),
    LINEAR,
)


def make_batch(shape: Shape, B: int) -> Batch:
    """B rows, seeded."""
    generator = torch.Generator(DEVICE).manual_seed(2404_19737)
    tokens = torch.randint(shape.V, (B, shape.S), generator=generator, device=DEVICE)
    return Batch(tokens, torch.rand(B, shape.S, generator=generator, device=DEVICE) + 0.1)


def build_model(size: Size) -> Any:
    """The wrapped model, on torch's default device.

    Raises:
        AbsentError: transformers is missing, or of a version that can't be used.
    """
    try:
        from transformers import AutoModelForCausalLM, LlamaConfig

        from mtp_ce.hf.wrapper import MTPWrapper
    except (ImportError, RuntimeError) as error:
        raise AbsentError(f"a training step needs transformers: {error}") from error
    config = LlamaConfig(
        vocab_size=size.shape.V,
        hidden_size=size.shape.D,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.attention_heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.shape.S,
        tie_word_embeddings=True,
    )
    trunk = AutoModelForCausalLM.from_config(config, dtype=size.shape.torch_dtype)
    model = MTPWrapper(trunk, size.shape.H, heads="residual")
    # They start at zero, where all heads are the same: a path that took one for another would not be found wrong.
    for block in model.heads.blocks:
        torch.nn.init.normal_(block.weight, std=config.initializer_range)
    return model.train()


class Training:
    """A model and its optimizer, which all paths share: how long a step takes does not depend on what is learnt."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        with DEVICE:
            self.model = build_model(size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=HAS_GPU or None)
        # AdamW makes its states in its first step, and no later one may find half of them.
        self.step(LINEAR, Batch(*(part[:, :8] for part in make_batch(size.shape, 1))))

    @property
    def unembed(self) -> Tensor:
        """The weight of the output layer [V, D], which is that of the embedding."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def hidden(self, batch: Batch) -> list[Tensor]:
        """H hidden states [B, S, D]."""
        states: list[Tensor] = self.model.head_hidden_states(input_ids=batch.tokens)
        return states

    def loss(self, path: Path, batch: Batch) -> Tensor:
        """The loss of a micro-batch, with its graph."""
        tokens, weights = batch
        if path is LINEAR:
            loss: Tensor = self.model(tokens, labels=tokens, token_weights=weights, weight_alignment="position").loss
            return loss
        return path.loss(self.hidden(batch), self.unembed, tokens, weights)

    def step(self, path: Path, batch: Batch) -> None:
        """One step."""
        self.loss(path, batch).backward()
        self.update()

    def update(self) -> None:
        """What follows a backward."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _region(self, path: Path, hidden: Sequence[Tensor], batch: Batch) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in hidden]
        path.loss(leaves, self.unembed, *batch).backward()
        return [leaf.grad for leaf in leaves]

    def results(self, path: Path, batch: Batch) -> Results:
        """The loss as a step computes it, and the gradients of hidden [B, S, H, D] and unembed; no update."""
        loss = self.loss(path, batch).detach()
        with torch.no_grad():
            hidden = self.hidden(batch)
        d_hidden = torch.stack(self._region(path, hidden, batch), dim=2)
        d_unembed = self.unembed.grad
        self.optimizer.zero_grad()
        return {"loss": loss, "d_hidden": d_hidden, "d_unembed": d_unembed}

    def share_in_loss(self, path: Path, batch: Batch) -> float:
        """The share of one step between the hidden states and the gradients of hidden and unembed.

        The step's backward is cut in two there: the loss of detached hidden states is differentiated first, and its
        gradients then go through heads and trunk. The same operations in the same order, with an instant of the device
        before and after the region; hooks of autograd would not say when the gradient of unembed is complete.
        """
        start = clock()
        hidden = self.hidden(batch)
        begin = clock()
        gradients = self._region(path, hidden, batch)
        end = clock()
        torch.autograd.backward(hidden, gradients)
        self.update()
        stop = clock()
        return (end - begin) / (stop - start)

    def held_bytes(self) -> int:
        """Bytes that are there between two steps: weights and the states of the optimizer."""
        states = [state for by_name in self.optimizer.state.values() for state in by_name.values()]
        tensors = [*self.model.parameters(), *(state for state in states if isinstance(state, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def parameters(self) -> int:
        """Their number, a tied weight once."""
        return sum(parameter.numel() for parameter in self.model.parameters())
