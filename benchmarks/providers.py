"""Who is measured on which path, in the order in which they run: the ceiling first, since shares are shares of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import eager, peers, products
from benchmarks.provider import Provider, needs
from benchmarks.shapes import PROMPT, Shape, live_rows
from mtp_ce import token_ce, weighted_mtp_ce, weighted_mtp_linear_ce


def mtp_ce(logits: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None) -> Tensor:
    """This project."""
    return weighted_mtp_ce(logits, labels, token_weights, softcap=softcap)


def mtp_ce_inplace(logits: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None) -> Tensor:
    """This project; the gradient overwrites the logits."""
    return weighted_mtp_ce(logits, labels, token_weights, softcap=softcap, inplace_backward=True)


def mtp_ce_linear(
    hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None
) -> Tensor:
    """This project."""
    return weighted_mtp_linear_ce(hidden, unembed, labels, token_weights, softcap=softcap)


def mtp_ce_dropped(
    hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None
) -> Tensor:
    """This project, told how many rows a prompt of `PROMPT` leaves: it drops the others, and waits for nothing."""
    B, S, H, _ = hidden.shape
    left = live_rows(B, S, H, PROMPT)
    return weighted_mtp_linear_ce(hidden, unembed, labels, token_weights, softcap=softcap, drop_dead_rows=left)


def dropped_missing(shape: Shape, device: torch.device) -> str | None:
    """Where the number of rows says nothing new."""
    if shape.prompt != PROMPT:
        return f"made for a prompt of {PROMPT:.0%}"
    return None if device.type == "cuda" else "a CPU counts live rows by itself"


def mtp_ce_tokens(hidden: Tensor, unembed: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """This project."""
    return token_ce(hidden, unembed, labels, softcap=softcap)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile of a function, when it is called."""

    def run(*arguments: Any) -> Tensor:
        return eager.compiled(function)(*arguments)

    return run


LIGER, CCE = needs("liger_kernel", "liger-kernel"), needs("cut_cross_entropy", "cut-cross-entropy")

PROVIDERS: dict[str, tuple[Provider, ...]] = {
    "logits": (
        Provider("mtp_ce", mtp_ce),
        Provider("mtp_ce_inplace", mtp_ce_inplace),
        Provider("eager_loop", eager.logits_loop),
        Provider("eager_rows", eager.logits_rows, swept=False),
        Provider("compiled_loop", compiled(eager.logits_loop), compiled=True),
        Provider("compiled_rows", compiled(eager.logits_rows), compiled=True, swept=False),
        Provider("liger_heads", peers.liger_logits_heads, LIGER, rounds=True),
        Provider("liger_rows", peers.liger_logits_rows, LIGER, rounds=True),
    ),
    "linear": (
        Provider("bare_products", products.three_products, ceiling=True),
        Provider("mtp_ce", mtp_ce_linear),
        Provider("mtp_ce_dropped", mtp_ce_dropped, dropped_missing),
        Provider("eager_loop", eager.linear_loop),
        Provider("eager_rows", eager.linear_rows, swept=False),
        Provider("compiled_loop", compiled(eager.linear_loop), compiled=True),
        Provider("torch_chunked", peers.torch_linear, peers.torch_missing, rounds=True),
        Provider(
            "torch_chunked_mean", peers.torch_linear_mean, peers.torch_missing, rounds=True, weighted=False, swept=False
        ),
        Provider("liger", peers.liger_linear, LIGER),
        Provider("liger_4096", peers.liger_linear_large, LIGER),
        Provider("liger_mean", peers.liger_linear_mean, LIGER, weighted=False, swept=False),
        Provider("cce", peers.cce_linear, CCE, rounds=True),
        Provider("cce_exact", peers.cce_linear_exact, CCE, rounds=True, swept=False),
        Provider("quack_mean", peers.quack_linear_mean, peers.quack_missing, weighted=False, swept=False),
    ),
    "token_ce": (
        Provider("bare_products", products.one_product, ceiling=True),
        Provider("mtp_ce", mtp_ce_tokens),
        Provider("eager_loop", eager.token_loop),
        Provider("compiled_loop", compiled(eager.token_loop), compiled=True),
        Provider("torch_chunked", peers.torch_token_ce, peers.torch_missing, rounds=True),
        Provider("liger", peers.liger_token_ce, LIGER),
        Provider("cce", peers.cce_token_ce, CCE),
    ),
}
BY_NAME = {path: {provider.name: provider for provider in those} for path, those in PROVIDERS.items()}
