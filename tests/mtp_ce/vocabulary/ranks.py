"""Ranks on gloo: `python ranks.py RANKS FOLDER` runs on all of them what FOLDER/jobs.json lists.

One process imports, and forks the ranks: models of transformers take 15 seconds to import. Every rank writes its
results to FOLDER/<rank>.pt: of a random case the tensors by name, of a scenario what its function returns, and in the
place of both the text of an exception.
"""

import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.multiprocessing import start_processes

TESTS = Path(__file__).resolve().parents[2]


def load(path: Path) -> ModuleType:
    """Import a file of the tests by its path: they are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mirrored(case: SimpleNamespace, seed: int) -> SimpleNamespace:
    """Every other case with its vocabulary in reverse: the others have their labels in the first half of it."""
    options = case.options
    if seed % 2 == 0:
        return case
    linear = "unembed" in options
    V = options["unembed"].shape[0] if linear else case.given[0].shape[-1]
    if linear:
        options["unembed"] = options["unembed"].flip(0)
        if options.get("bias") is not None:
            options["bias"] = options["bias"].flip(0)
    else:
        given = case.given
        case.given = given.flip(-1) if isinstance(given, Tensor) else [x.flip(-1) for x in given]
    ignored, other = options["ignore_index"], V - 1 - case.labels
    # A label that would become the ignored one stays what it is.
    case.labels = torch.where((case.labels == ignored) | (other == ignored), case.labels, other)
    return case


def place(tensor: Tensor, mesh: Any, dim: int) -> DTensor:
    """Shard a tensor that every rank has, as torch.chunk divides it, with the strides that it has."""
    dim %= tensor.dim()
    V, ranks = tensor.shape[dim], mesh.size()
    size = -(-V // ranks)
    start = min(V, mesh.get_local_rank() * size)
    local = tensor.narrow(dim, start, min(size, V - start))
    return DTensor.from_local(
        local, mesh, [Shard(dim)], run_check=False, shape=tensor.shape, stride=tensor.contiguous().stride()
    )


def placed(case: SimpleNamespace, mesh: Any, seed: int) -> SimpleNamespace:
    """The tensors of a case that have a vocabulary as DTensors; in a third of the cases hidden is one, too."""
    options = {**case.options}
    if "unembed" not in options:
        whole = isinstance(case.given, Tensor)
        given = place(case.given, mesh, -1) if whole else [place(x, mesh, -1) for x in case.given]
        return SimpleNamespace(given=given, labels=case.labels, weights=case.weights, options=options)
    for name in ("unembed", "bias"):
        if options.get(name) is not None:
            options[name] = place(options[name], mesh, 0)
    given = case.given
    if seed % 3 == 0:
        replicated = [Replicate()]
        if isinstance(given, Tensor):
            given = DTensor.from_local(given, mesh, replicated, run_check=False)
        else:
            given = [DTensor.from_local(x, mesh, replicated, run_check=False) for x in given]
    return SimpleNamespace(given=given, labels=case.labels, weights=case.weights, options=options)


def local(value: Any) -> Any:
    """This rank's part of results, in which gradients may be DTensors."""
    if isinstance(value, DTensor):
        return value.to_local()
    if isinstance(value, list):
        return [local(item) for item in value]
    return value


def results(got: SimpleNamespace) -> dict[str, Any]:
    """The results of `evaluate`, with the placements of gradients."""
    found = {name: local(getattr(got, name)) for name in vars(got) if name != "stats"}
    first = (got.d_logits or got.d_hidden or [None])[0]
    kinds = {"first": first, "d_unembed": got.d_unembed, "d_bias": got.d_bias}
    found["placements"] = {name: str(getattr(x, "placements", None)) for name, x in kinds.items() if x is not None}
    return found | {"stats": tuple(got.stats)}


class Ranks:
    """What the scenarios share: a mesh, the tests' own helpers, numbers that every rank draws alike."""

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
        self.rank, self.ranks, self.folder = rank, ranks, folder
        self.conftest = load(TESTS / "conftest.py")
        self.cases = load(TESTS / "mtp_ce" / "loss" / "test_random_cases.py")

    def random(self, kind: str, impl: str, seed: int) -> dict[str, Any]:
        """The results of one random case."""
        draw = getattr(self.cases, "draw_linear_case" if kind == "linear" else "draw_case")
        case = mirrored(draw(seed, self.conftest.draw_on(torch.device("cpu"))), seed)
        case = placed(case, self.mesh, seed)
        return results(self.conftest.evaluate(impl, case.given, case.labels, case.weights, **case.options))

    def batch(self, V: int = 11, H: int = 2, S: int = 6, D: int = 5, **changes: Any) -> SimpleNamespace:
        """Whole tensors, and those with a vocabulary as leaves that are DTensors."""
        draw = self.conftest.draw_on(torch.device("cpu"))
        case = SimpleNamespace(
            hidden=draw.normal(2, S, H, D), unembed=draw.normal(V, D), bias=draw.normal(V),
            logits=draw.normal(2, S, H, V), labels=draw.integers(V, 2, S), weights=draw.uniform(2, S),
        )  # fmt: skip
        vars(case).update(changes)
        case.hidden_leaf = case.hidden.clone().requires_grad_()
        for name, dim in (("unembed", 0), ("bias", 0), ("logits", -1)):
            setattr(case, f"{name}_shard", place(getattr(case, name), self.mesh, dim).detach().requires_grad_())
        return case


SCENARIOS: dict[str, Callable[[Ranks], Any]] = {}


def scenario(function: Callable[[Ranks], Any]) -> Callable[[Ranks], Any]:
    """Add a function to what ranks run by name."""
    SCENARIOS[function.__name__] = function
    return function


def raised(call: Callable[[], Any]) -> str:
    """Type and text of the exception of a call."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@scenario
def all_rows_masked(ranks: Ranks) -> Any:
    from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce

    case = ranks.batch(labels=torch.full((2, 6), -100))
    found = []
    for impl in ("cpu", "triton"):
        of_layer = weighted_mtp_linear_ce(
            case.hidden_leaf, case.unembed_shard, case.labels, bias=case.bias_shard, impl=impl
        )
        of_logits = weighted_mtp_ce(case.logits_shard, case.labels, impl=impl)
        leaves = (case.hidden_leaf, case.unembed_shard, case.bias_shard, case.logits_shard)
        gradients = torch.autograd.grad(of_layer + of_logits, leaves)
        found += [of_layer.detach(), of_logits.detach(), *(local(x) for x in gradients)]
    return found


@scenario
def numbers_sent(ranks: Ranks) -> Any:
    """How many numbers of a call each collective takes from this rank, by its name."""
    from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce

    case, counts = ranks.batch(), {}
    sent: list[tuple[str, int]] = []
    gather, reduce = dist.all_gather_into_tensor, dist.all_reduce

    def counted_gather(output: Tensor, x: Tensor, **options: Any) -> Any:
        sent.append(("gather", x.numel()))
        return gather(output, x, **options)

    def counted_reduce(x: Tensor, **options: Any) -> Any:
        sent.append(("reduce", x.numel()))
        return reduce(x, **options)

    dist.all_gather_into_tensor, dist.all_reduce = counted_gather, counted_reduce
    try:
        for impl in ("cpu", "triton"):
            for name, options in {
                "plain": {},
                "everything": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "return_stats": True},
            }.items():
                calls = {
                    "logits": lambda how: weighted_mtp_ce(case.logits_shard, case.labels, case.weights, **how),
                    "linear": lambda how: weighted_mtp_linear_ce(
                        case.hidden_leaf, case.unembed_shard, case.labels, case.weights, bias=case.bias_shard,
                        chunk_bytes=100, drop_dead_rows=False, **how,
                    ),
                }  # fmt: skip
                for kind, call in calls.items():
                    sent.clear()
                    outcome = call({**options, "impl": impl})
                    (outcome.loss if name == "everything" else outcome).backward()
                    counts[impl, kind, name] = [*sent]
    finally:
        dist.all_gather_into_tensor, dist.all_reduce = gather, reduce
    rows = case.labels.numel() * 2
    return {"counts": counts, "rows": rows, "D": case.hidden.shape[-1]}


@scenario
def different_calls(ranks: Ranks) -> Any:
    """Calls of which one rank's is not that of the others."""
    from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce

    case, odd = ranks.batch(), ranks.rank == ranks.ranks - 1
    hidden, unembed, logits, labels = case.hidden_leaf, case.unembed_shard, case.logits_shard, case.labels
    other, outside = labels.clone(), labels.clone()
    other[1, 2] = (labels[1, 2] + odd) % 11
    outside[0, 3] = 11 if odd else 0
    # Without two of the weights, of which the indices have the same sum as those of the others.
    masked = torch.ones(12)
    masked[[1, 4] if odd else [2, 3]] = 0
    nan = torch.where(torch.eye(2, 6) > 0, float("nan"), case.weights) if odd else case.weights
    few = slice(0 if odd else 2)
    first = place(case.logits[few], ranks.mesh, -1)
    # As torch.tensor_split divides 10 entries, 4 + 3 + 3: the first rank of 3 or more holds what it should.
    sizes = [len(x) for x in torch.arange(10).tensor_split(ranks.ranks)]
    held = torch.ones(sizes[ranks.rank] + (ranks.ranks == 2 and odd), 5)
    split = DTensor.from_local(held, ranks.mesh, [Shard(0)], run_check=False, shape=(10, 5), stride=(5, 1))
    calls = {
        "labels": lambda: weighted_mtp_linear_ce(hidden, unembed, other),
        "weights": lambda: weighted_mtp_ce(logits, labels, masked.view(2, 6)),
        "label outside": lambda: weighted_mtp_linear_ce(hidden, unembed, outside),
        "label outside, logits": lambda: weighted_mtp_ce(logits, outside),
        "NaN": lambda: weighted_mtp_linear_ce(hidden, unembed, labels, nan, validate=True),
        "no rows": lambda: weighted_mtp_ce(first, labels[few]),
        "heads": lambda: weighted_mtp_linear_ce(hidden[:, :, : 1 + odd], unembed, labels),
        "statistics": lambda: weighted_mtp_linear_ce(hidden, unembed, labels, return_stats=odd),
        "frozen": lambda: weighted_mtp_linear_ce(hidden.detach() if odd else hidden, unembed, labels),
        "entries": lambda: weighted_mtp_linear_ce(hidden, split, labels % 10),
        "reference": lambda: weighted_mtp_linear_ce(hidden, unembed, other, impl="reference"),
    }
    return {name: raised(call) for name, call in calls.items()}


@scenario
def in_place(ranks: Ranks) -> Any:
    """Gradients written over the logits of a layer, the same as without; a leaf is refused, and a saved tensor seen."""
    from mtp_ce import weighted_mtp_ce

    case = ranks.batch()
    found: dict[str, Any] = {}
    for impl in ("cpu", "triton"):
        for inplace in (False, True):
            leaf = case.logits_shard.detach().requires_grad_()
            logits = leaf * 1.5
            memory = logits.to_local().data_ptr()
            loss = weighted_mtp_ce(logits, case.labels, case.weights, inplace_backward=inplace, impl=impl)
            (of_logits,) = torch.autograd.grad(loss, logits)
            found[impl, inplace] = of_logits.to_local().clone()
            if inplace:
                found[impl, "overwritten"] = of_logits.to_local().data_ptr() == memory
    leaf = case.logits_shard
    found["leaf"] = raised(lambda: weighted_mtp_ce(leaf, case.labels, inplace_backward=True))
    logits = leaf * 1.5
    saved = logits.exp()  # saves its result, not logits
    squared = (logits * logits).sum()  # saves logits
    loss = weighted_mtp_ce(logits, case.labels, inplace_backward=True)
    loss.backward(retain_graph=True)
    found["saved"] = raised(squared.backward)
    del saved
    return found


@scenario
def retained_graph(ranks: Ranks) -> Any:
    from mtp_ce import weighted_mtp_linear_ce

    case = ranks.batch()
    leaves = (case.hidden_leaf, case.unembed_shard, case.bias_shard)
    loss = weighted_mtp_linear_ce(*leaves[:2], case.labels, case.weights, bias=case.bias_shard)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(3 * loss, leaves)
    second = raised(
        lambda: torch.autograd.grad(
            torch.autograd.grad(weighted_mtp_linear_ce(*leaves[:2], case.labels), case.hidden_leaf, create_graph=True)[
                0
            ].sum(),
            case.hidden_leaf,
        )
    )
    return {"once": [local(x) for x in once], "twice": [local(x) for x in twice], "second": second}


@scenario
def other_functions(ranks: Ranks) -> Any:
    """token_ce, impl="reference", autocast, a list of heads, and the module."""
    from mtp_ce import WeightedMTPLoss, token_ce, weighted_mtp_ce, weighted_mtp_linear_ce

    case = ranks.batch()
    layer = (case.hidden, case.unembed)
    of_shard = (case.hidden, case.unembed_shard)
    one = (case.hidden[:, :, 0], case.unembed_shard)
    heads = [place(x, ranks.mesh, -1) for x in case.logits.unbind(2)]
    found: dict[str, Any] = {
        "token_ce": (token_ce(*of_shard, case.labels, softcap=3.0), token_ce(*layer, case.labels, softcap=3.0)),
        "token_ce of one head": (
            token_ce(*one, case.labels, bias=case.bias_shard),
            token_ce(one[0], case.unembed, case.labels, bias=case.bias),
        ),
        "list of heads": (
            weighted_mtp_ce(heads, case.labels, validate=True), weighted_mtp_ce(case.logits, case.labels)
        ),
        "module": (WeightedMTPLoss()(case.logits_shard, case.labels), weighted_mtp_ce(case.logits, case.labels)),
        "terms that are tensors": (
            weighted_mtp_ce(case.logits_shard, case.labels, label_smoothing=torch.tensor(0.1), impl="triton"),
            weighted_mtp_ce(case.logits, case.labels, label_smoothing=0.1),
        ),
    }  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = (
            weighted_mtp_linear_ce(*of_shard, case.labels, bias=case.bias_shard),
            weighted_mtp_linear_ce(*layer, case.labels, bias=case.bias),
        )
    leaves = (case.hidden_leaf, case.unembed_shard, case.logits_shard)
    loss = weighted_mtp_linear_ce(*leaves[:2], case.labels, impl="reference")
    loss = loss + weighted_mtp_ce(leaves[2], case.labels, impl="reference")
    fused = weighted_mtp_linear_ce(*leaves[:2], case.labels) + weighted_mtp_ce(leaves[2], case.labels)
    pairs = zip(torch.autograd.grad(fused, leaves), torch.autograd.grad(loss, leaves), strict=True)
    found["reference"] = (fused, loss)
    found |= {f"reference, gradient {i}": tuple(local(x) for x in pair) for i, pair in enumerate(pairs)}
    return {name: tuple(x.detach() for x in pair) for name, pair in found.items()}


@scenario
def refused(ranks: Ranks) -> Any:
    """Calls that every rank refuses alike, before anything is sent."""
    from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce

    case = ranks.batch()
    wide = case.labels.clone()
    wide[0, 3] = 11
    held, mesh = case.unembed_shard.to_local().detach(), ranks.mesh
    uneven = DTensor.from_local(
        torch.ones(len(held) + 1, 5), mesh, [Shard(0)], run_check=False, shape=(11, 5), stride=(5, 1)
    )
    # As from_local infers V where ranks hold different numbers of entries.
    of_another_V = DTensor.from_local(torch.ones(3 + ranks.rank, 5), mesh, [Shard(0)], run_check=False)
    few = case.labels % 3
    return {
        "label": raised(lambda: weighted_mtp_ce(case.logits_shard, wide)),
        "label, linear": raised(lambda: weighted_mtp_linear_ce(case.hidden, case.unembed_shard, wide)),
        "too few rows": raised(
            lambda: weighted_mtp_linear_ce(case.hidden, case.unembed_shard, case.labels, drop_dead_rows=3)
        ),
        "chunk_bytes": raised(
            lambda: weighted_mtp_linear_ce(case.hidden, case.unembed_shard, case.labels, chunk_bytes=8)
        ),
        "of another V": raised(lambda: weighted_mtp_linear_ce(case.hidden, of_another_V, few)),
        "uneven": raised(lambda: weighted_mtp_linear_ce(case.hidden, uneven, case.labels)),
        "torch.func": raised(
            lambda: torch.func.grad(lambda hidden: weighted_mtp_linear_ce(hidden, case.unembed_shard, case.labels))(
                case.hidden
            )
        ),
    }


@scenario
def documented(ranks: Ranks) -> Any:
    """The program of docs/many_gpus.md, on CPUs."""
    page = (TESTS.parent / "docs/many_gpus.md").read_text(encoding="utf-8")
    program = page.partition("```python\n")[2].partition("```")[0].replace('"cuda"', '"cpu"')
    names: dict[str, Any] = {}
    exec(program, names)
    return names["loss"]


@scenario
def peak_memory(ranks: Ranks) -> Any:
    """Bytes that one forward and backward of the linear path hold at most, of a shard and of the whole layer."""
    from torch.profiler import ProfilerActivity, profile

    from mtp_ce import weighted_mtp_linear_ce

    case = ranks.batch(V=8192, S=64, D=32)
    peaks = []
    for unembed in (case.unembed_shard, case.unembed.clone().requires_grad_()):
        leaf = case.hidden.clone().requires_grad_()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            weighted_mtp_linear_ce(leaf, unembed, case.labels).backward()
        held = peak = 0
        events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        peaks.append(peak)
    return {"shard": peaks[0], "whole": peaks[1], "hidden": case.hidden.numel() * 4}


@scenario
def compiled(ranks: Ranks) -> Any:
    """torch.compile(fullgraph=True) of both losses on DTensors, beside the eager call: loss and gradients."""
    from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce

    case = ranks.batch()

    def of_layer(hidden: Tensor, unembed: Tensor, bias: Tensor) -> Tensor:
        return weighted_mtp_linear_ce(hidden, unembed, case.labels, case.weights, bias=bias)

    def of_logits(logits: Tensor) -> Tensor:
        return weighted_mtp_ce(logits, case.labels, case.weights)

    found: dict[str, Any] = {}
    for name, function, leaves in (
        ("linear", of_layer, (case.hidden_leaf, case.unembed_shard, case.bias_shard)),
        ("logits", of_logits, (case.logits_shard,)),
    ):
        pairs = []
        for call in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
            loss = call(*leaves)
            gradients = torch.autograd.grad(loss, leaves)
            pairs.append([loss.detach(), *(local(x) for x in gradients)])
        found[name] = [*zip(*pairs, strict=True)]
    return found


def main(ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    jobs = json.loads((folder / "jobs.json").read_text())
    scenarios = load(Path(__file__).parent / jobs["module"]).SCENARIOS if "module" in jobs else SCENARIOS
    start_processes(run, (ranks, folder, jobs, scenarios), nprocs=ranks, start_method="fork")


def run(rank: int, ranks: int, folder: Path, jobs: dict[str, Any], scenarios: dict[str, Callable[..., Any]]) -> None:
    """What one rank runs."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=600)
    )
    state, found = Ranks(folder, rank, ranks), {}
    for name in jobs["scenarios"]:
        found[name] = attempt(scenarios[name], state)
    for kind, impl, seed in jobs["cases"]:
        found[kind, impl, seed] = attempt(state.random, kind, impl, seed)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, or the text of its exception."""
    try:
        return function(*arguments)
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
