"""The ranks of a run, one process per device, started by torchrun or `accelerate launch`; or a single process.

    batch of a step       the same rows for any number of ranks; rank r takes the r-th of equal slices
    gradients             averaged by FSDP, so each rank divides its loss by N / ranks, N counted over the global batch
    loss, weights, stop   one small all-gather per step, so that either all ranks take a step or none does

Every rank runs every forward and backward, because all ranks gather the sharded parameters together.

With train.tensor_parallel the ranks form a mesh: groups of neighbours share the layers and have the same rows, and FSDP
shards what each of them has over the groups. "Data rank" is then the number of the group.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.rendezvous import rendezvous
from transformers import PreTrainedModel

from mtp_ce.heads.trunk import decoder_layers
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.training.config.loop import TrainConfig
from mtp_ce.training.errors import LeaderFailedError, RecipeError, StoppedError
from mtp_ce.training.interrupt import Stop, ignore_sigterm, stop_on_signal
from mtp_ce.training.models.tensor_parallel import share_layers

T = TypeVar("T")

# Every rank would warn that a parameter sharded over both dimensions of a mesh is gathered in two steps.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

# Timeout of gloo collectives in which ranks wait for the work of rank 0, such as training a critic.
LONGEST_WAIT = timedelta(hours=12)
# Timeout of the collectives of a step; gloo detects a lost rank by itself, NCCL only by this.
LONGEST_STEP = timedelta(minutes=10)
# How long the other ranks of a failed run wait for rank 0 to finish with MLflow and S3.
LONGEST_END = timedelta(minutes=3)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, as one of them sees them.

    Attributes:
        rank: this process's number, from 0.
        size: number of ranks.
        mesh: the mesh over which parameters are sharded; ("dp", "tp") where layers are shared. None for a single
            process.
        stop: the flag that signals set on one of several ranks, for the whole run; never set for a single process.
        tensor_parallel: number of ranks that share the layers.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    stop: Stop = field(default_factory=Stop)
    tensor_parallel: int = 1

    @property
    def sharded(self) -> bool:
        """Return whether models are sharded, over one rank or several."""
        return self.mesh is not None

    @property
    def leads(self) -> bool:
        """Return whether this is rank 0, the only rank that prints, tracks and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which slice of every batch this rank has, from 0."""
        return self.rank // self.tensor_parallel

    @property
    def data_size(self) -> int:
        """Number of slices of a batch: the ranks, or the groups of those that share the layers."""
        return self.size // self.tensor_parallel

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """This rank, and one of every other group, which together have all rows; None means all ranks."""
        return self.mesh["dp"].get_group() if self.mesh is not None and self.tensor_parallel > 1 else None

    def check_batch(self, batch_size: int, micro_batch_size: int | None) -> None:
        """Check that a batch divides evenly over the ranks.

        Raises:
            RecipeError: ranks would get different numbers of rows, or of micro-batches.
        """
        shared = self.tensor_parallel
        ranks = f"{self.size} ranks" if shared == 1 else f"{self.data_size} groups of {shared} ranks"
        if batch_size % self.data_size:
            raise RecipeError(f"train.batch_size {batch_size} is not divisible by {ranks}; give a multiple")
        if micro_batch_size and batch_size // self.data_size % micro_batch_size:
            raise RecipeError(
                f"train.micro_batch_size {micro_batch_size} does not divide the {batch_size // self.data_size} rows "
                f"that each of {ranks} gets of train.batch_size {batch_size}"
            )

    def slice(self, count: int) -> slice:
        """Return this rank's slice of `count` rows; the number of slices divides `count`."""
        each = count // self.data_size
        return slice(self.data_rank * each, (self.data_rank + 1) * each)

    def gather(self, values: Tensor) -> Tensor:  # [k]
        """Gather a tensor from every rank: [ranks, k]."""
        if self.mesh is None:
            return values[None]
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values)
        return torch.stack(gathered)

    def add(self, *tensors: Tensor) -> None:
        """Replace each tensor, which follows from this rank's rows, by its sum over all rows."""
        if self.mesh is not None:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.data_group)

    def share(self, value: T) -> T:
        """Broadcast a picklable value from rank 0."""
        if self.mesh is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        shared: T = box[0]
        return shared

    def lead(self, work: Callable[[], T]) -> T | None:
        """Run `work` on rank 0 while the others wait; return its result there, and None on the others.

        Raises:
            LeaderFailedError: on the other ranks, if it failed.
            StoppedError: on all ranks, if a signal ended it.
        """
        result, failure = None, None
        if self.leads:
            try:
                result = work()
            except BaseException as error:
                failure = error
        stopped = failure.signal if isinstance(failure, StoppedError) else None
        failed, stopped = self.share((failure is not None, stopped))
        if failure is not None:
            raise failure
        if stopped:
            raise StoppedError(stopped)
        if failed:
            raise LeaderFailedError
        return result

    def leader_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0, which fills a cache, and then on every other rank; a signal ends it at once.

        Raises:
            RecipeError: on rank 0, also for a mistake on another rank only, such as a file that its machine lacks.
            LeaderFailedError: on the other ranks, if any rank failed.
            StoppedError: on all ranks, if a signal reached one of them.
        """

        def interruptible() -> T:
            with self.stop.at_once():
                return work()

        result, mistake = self.lead(interruptible), None
        if not self.leads:
            try:
                result = interruptible()
            except RecipeError as error:
                mistake = f"{name_of(self.rank)}: {error}"
            except StoppedError:
                pass  # agreed on below
        if mistakes := [message for message in self.collect(mistake) if message]:
            raise RecipeError(mistakes[0]) if self.leads else LeaderFailedError
        self.check(self.stop)
        assert result is not None
        return result

    def check(self, stop: Stop) -> None:
        """Raise StoppedError on all ranks if the flag is set on one of them."""
        if number := max(self.collect(stop.signal)):
            raise StoppedError(number)

    def collect(self, value: T) -> list[T]:
        """Gather a picklable value from every rank."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def shard(self, model: MTPWrapper, train: TrainConfig) -> None:
        """Shard a model's parameters over the ranks, which hold equal copies.

        Each decoder layer is an FSDP group. Embeddings, final norm, unembedding and small heads form one more group:
        the loss needs most of them at once, and tied ones are one tensor.

        Args:
            model: on the device; unchanged without a mesh.
            train: precision of forward and backward, and whether parameters are offloaded in between.
        """
        if self.mesh is None:
            return
        mesh = self.mesh
        if self.tensor_parallel > 1:
            share_layers(model, mesh["tp"])
            mesh = mesh["dp"]
        layers, _ = decoder_layers(model.causal)
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        precision = half if train.precision == "bf16" else MixedPrecisionPolicy()
        # Pinned memory makes copies to a GPU asynchronous.
        pinned = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        where: dict[str, Any] = {"mesh": mesh, "offload_policy": pinned if train.cpu_offload else OffloadPolicy()}
        for layer in (*layers, *model.heads.decoder_layers):
            fully_shard(layer, mp_policy=precision, **where)
        # The root's inputs are tokens and the loss's weights and normalizer, which a cast to bf16 would round.
        fully_shard(model, mp_policy=replace(precision, cast_forward_inputs=False), **where)
        register_fsdp_forward_method(model, "head_hidden_states")

    def shard_frozen(self, model: PreTrainedModel) -> None:
        """Shard a frozen scoring model; its output layer stays replicated, because every micro-batch needs it."""
        if self.mesh is None:
            return
        layers, _ = decoder_layers(model)
        mesh = self.mesh["dp"] if self.tensor_parallel > 1 else self.mesh
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.base_model, mesh=mesh)

    def full_tensors(self, model: MTPWrapper) -> dict[str, Tensor] | None:
        """Gather a sharded model's tensors on rank 0; empty on the others, None if the model is not sharded."""
        if self.mesh is None:
            return None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors: dict[str, Any] = get_model_state_dict(model, options=options)
        return without_ties(model, tensors)


ALONE = Ranks()


def without_ties(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop all names but one of each tied parameter."""
    unique, named = (dict(model.named_parameters(remove_duplicate=remove)) for remove in (True, False))
    return {name: tensor for name, tensor in tensors.items() if name in unique or name not in named}


def name_of(rank: int) -> str:
    """Return the name of this process for messages."""
    return f"rank {rank} on {socket.gethostname()}"


@contextmanager
def join_ranks(
    device: torch.device,
    train: TrainConfig,
    answer: Callable[[BaseException], int] | None = None,
    agreed: tuple[type[BaseException], ...] = (),
) -> Iterator[Ranks]:
    """Join the process group that the launcher's environment describes; without one, run as a single process.

    An existing process group is used and not destroyed.

    Args:
        device: "cpu" or "cuda"; each rank takes the GPU of its local rank.
        train: with bf16 or CPU offload, a single process is sharded by FSDP over itself.
        answer: reports an exception and returns the exit code, or raises the exception. One of several processes
            exits in here with that code; without `answer` the exception is raised.
        agreed: exceptions that all ranks raise together, beside RecipeError, StoppedError and LeaderFailedError.

    Raises:
        RecipeError: the ranks can't be divided into groups of train.tensor_parallel.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    shared = train.tensor_parallel
    if size == 1:
        check_groups(size, shared)
    if size == 1 and train.precision == "fp32" and not train.cpu_offload:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    ours = not dist.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        rank, store = _rendezvous(size)
        dist.init_process_group(backend, timeout=LONGEST_STEP, store=store, rank=rank, world_size=size)
        assert dist.group.WORLD is not None
        dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(LONGEST_WAIT)
    try:
        with stop_on_signal() if size > 1 else nullcontext(Stop()) as stop:
            check_groups(size, shared)
            if shared == 1:
                mesh = init_device_mesh(device.type, (size,))
            else:
                mesh = init_device_mesh(device.type, (size // shared, shared), mesh_dim_names=("dp", "tp"))
            yield Ranks(dist.get_rank(), size, mesh, stop, shared)
    except BaseException as error:
        if ours and size == 1:
            dist.destroy_process_group()
        elif ours and answer:
            _leave(rank, store, error, answer, (*agreed, LeaderFailedError, RecipeError, StoppedError))
        raise
    if ours:
        dist.destroy_process_group()


def check_groups(size: int, shared: int) -> None:
    """Check that ranks can be divided into groups of those that share the layers.

    Raises:
        RecipeError: they can't.
    """
    if size % shared:
        raise RecipeError(
            f"train.tensor_parallel {shared} does not divide the {size} rank{'s' if size > 1 else ''} of this run; "
            f"start a multiple of {shared}, such as torchrun --nproc-per-node {shared}"
        )


def _leave(
    rank: int,
    store: dist.Store,
    error: BaseException,
    answer: Callable[[BaseException], int],
    agreed: tuple[type[BaseException], ...],
) -> NoReturn:
    """Exit one of several processes after a failure.

    The process group is not destroyed: NCCL would wait for collectives that the other ranks never reach. Where all
    ranks fail for one reason, rank 0 exits first, because launchers kill the remaining processes when one has exited;
    the others exit with its code.
    """
    ignore_sigterm()
    try:
        code = answer(error)
    except BaseException:
        # In one write: what other ranks print at the same time must not come between.
        print(f"{name_of(rank)} crashed:\n{''.join(traceback.format_exception(error))}", end="", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        # The store lives in rank 0: if it is unreachable, rank 0 has exited.
        with suppress(dist.DistError):
            if rank == 0:
                store.set("ended", str(code))
            elif isinstance(error, agreed):
                store.wait(["ended"], LONGEST_END)
                code = int(store.get("ended"))
    finally:
        # Skips the destructor of the process group.
        os._exit(code)


def _rendezvous(size: int) -> tuple[int, dist.Store]:
    """Return this process's rank, and the store through which processes find each other."""
    if size == 1:
        return 0, dist.HashStore()
    store, rank, _ = next(rendezvous("env://"))
    return rank, dist.PrefixStore(agree_on_round(store, rank, size), store)


def agree_on_round(store: dist.Store, rank: int, size: int) -> str:
    """Agree on a name of this start of the workers that no earlier start had.

    torchrun keeps one store across restarts of its workers, in which restarted workers would find the addresses of
    dead ones; the restart count differs between nodes, so it can't serve as the name.

    Args:
        store: shared by all ranks; holds keys of earlier starts.
        rank: of this process.
        size: number of ranks.

    Returns:
        The name, equal on all ranks.
    """
    mine = uuid4().hex
    store.set(f"seen {rank}", "")
    store.set(f"name {rank}", mine)
    while True:
        if rank == 0:
            # Some names may be those of dead ranks, which never acknowledge.
            names = " ".join(store.get(f"name {other}").decode() for other in range(size))
            store.set("names", names)
            if all(store.get(f"seen {other}").decode() == names for other in range(1, size)):
                store.set("round", names)
                return _short(names)
        else:
            names = store.get("names").decode()
            if mine in names:
                store.set(f"seen {rank}", names)
            # Checked last: on the first start the key exists only after all ranks have seen the names.
            if store.check(["round"]) and mine in (names := store.get("round").decode()):
                return _short(names)
        time.sleep(0.01)


def _short(names: str) -> str:
    # It prefixes every key of the store.
    return hashlib.sha256(names.encode()).hexdigest()[:16]
