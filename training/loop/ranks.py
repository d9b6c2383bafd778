"""The processes of a run, one to a device, that torchrun or `accelerate launch` started; or one that is alone.

    batch of a step       the same rows for any number of ranks; rank r takes the r-th of as many equal slices
    gradients             averaged by FSDP, so each rank divides its loss by N / ranks, N counted over the whole batch
    loss, weights, stop   one small gather a step, so that all ranks take a step or none does

Every rank runs every forward and backward: parameters are gathered for them by all ranks together.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
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
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from mtp_ce.heads.layers import LayerHeads, decoder_layers
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.training.config.loop import TrainConfig
from mtp_ce.training.errors import LeaderFailedError, RecipeError, StoppedError
from mtp_ce.training.interrupt import ignore_sigterm

T = TypeVar("T")

# What one rank does alone, such as training a critic, the others await in a collective of gloo.
LONGEST_WAIT = timedelta(hours=12)
# A collective of a step; gloo knows by itself that a rank is gone, NCCL by this alone.
LONGEST_STEP = timedelta(minutes=10)
# The end of a run that failed: what rank 0 has for MLflow and S3.
LONGEST_END = timedelta(minutes=3)


@dataclass(frozen=True)
class Ranks:
    """Who takes part.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        mesh: over what parameters are sharded; None for one process.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def sharded(self) -> bool:
        """Whether models are sharded, over one rank or several."""
        return self.mesh is not None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone speaks, tracks and writes."""
        return self.rank == 0

    def check_batch(self, batch_size: int, micro_batch_size: int | None) -> None:
        """Look whether a batch can be dealt out.

        Raises:
            RecipeError: ranks would get different numbers of rows, or of micro-batches.
        """
        if batch_size % self.size:
            raise RecipeError(f"train.batch_size {batch_size} can't be dealt out to {self.size} ranks; give a multiple")
        if micro_batch_size and batch_size // self.size % micro_batch_size:
            raise RecipeError(
                f"train.micro_batch_size {micro_batch_size} does not divide the {batch_size // self.size} rows that "
                f"each of {self.size} ranks gets of train.batch_size {batch_size}"
            )

    def slice(self, count: int) -> slice:
        """This rank's part of `count` rows, which the number of ranks divides."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, values: Tensor) -> Tensor:  # [k]
        """Give what every rank gave, [ranks, k]."""
        if self.mesh is None:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.stack(parts)

    def add(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.mesh is not None:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def share(self, value: T) -> T:
        """Give every rank what rank 0 gave, which can be pickled."""
        if self.mesh is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        shared: T = box[0]
        return shared

    def lead(self, work: Callable[[], T]) -> T | None:
        """Have rank 0 do something while the others wait; None for those.

        Raises:
            LeaderFailedError: on the other ranks, where it failed.
        """
        result, failure = None, None
        if self.leads:
            try:
                result = work()
            except BaseException as error:
                failure = error
        failed = self.share(failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise LeaderFailedError
        return result

    def leader_first(self, work: Callable[[], T]) -> T:
        """Have rank 0 do what fills a cache, and then every other rank the same.

        Raises:
            RecipeError: on rank 0, also a mistake that only another rank meets, such as a file that its machine lacks.
            LeaderFailedError: on the other ranks, for any of them.
        """
        result, mistake = self.lead(work), None
        if not self.leads:
            try:
                result = work()
            except RecipeError as error:
                mistake = f"{name_of(self.rank)}: {error}"
        if mistakes := [found for found in self._collect(mistake) if found]:
            raise RecipeError(mistakes[0]) if self.leads else LeaderFailedError
        assert result is not None
        return result

    def _collect(self, value: T) -> list[T]:
        """What every rank gave, which can be pickled."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def shard(self, model: MTPWrapper, train: TrainConfig) -> None:
        """Shard a model's parameters over the ranks, which hold the same ones.

        Decoder layers are groups of their own. Embeddings, final norm, unembedding and small heads are one: the loss
        needs most of them at once, and tied ones are one tensor.

        Args:
            model: on the device; without a mesh it stays as it is.
            train: precision of forward and backward, and where parameters are in between.
        """
        if self.mesh is None:
            return
        layers, _ = decoder_layers(model.causal)
        heads = model.heads.layers if isinstance(model.heads, LayerHeads) else ()
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        precision = half if train.precision == "bf16" else MixedPrecisionPolicy()
        # Memory is pinned for copies to a GPU.
        pinned = CPUOffloadPolicy(pin_memory=self.mesh.device_type == "cuda")
        where: dict[str, Any] = {"mesh": self.mesh, "offload_policy": pinned if train.cpu_offload else OffloadPolicy()}
        for layer in (*layers, *heads):
            fully_shard(layer, mp_policy=precision, **where)
        # What comes from outside are tokens, and numbers of the loss that bf16 would round: weights, and their divisor.
        fully_shard(model, mp_policy=replace(precision, cast_forward_inputs=False), **where)
        register_fsdp_forward_method(model, "head_hidden_states")

    def shard_frozen(self, model: PreTrainedModel) -> None:
        """Shard a model that only scores; its output layer, which every micro-batch needs as a whole, stays whole."""
        if self.mesh is None:
            return
        layers, _ = decoder_layers(model)
        for layer in layers:
            fully_shard(layer, mesh=self.mesh)
        fully_shard(model.base_model, mesh=self.mesh)

    def whole(self, model: MTPWrapper) -> dict[str, Tensor] | None:
        """Gather a sharded model's tensors on rank 0; empty on the others, None for one rank, which has them."""
        if self.mesh is None:
            return None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors: dict[str, Any] = get_model_state_dict(model, options=options)
        return without_ties(model, tensors)


ALONE = Ranks()


def without_ties(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out of a model's tensors all names but one of a parameter that has several."""
    once, every = (dict(model.named_parameters(remove_duplicate=unique)) for unique in (True, False))
    return {name: tensor for name, tensor in tensors.items() if name in once or name not in every}


def local(value: Tensor) -> Tensor:
    """A value that all ranks hold in part, such as the norm of a sharded gradient, as a whole."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def name_of(rank: int) -> str:
    """How a message calls this process."""
    return f"rank {rank} on {socket.gethostname()}"


@contextmanager
def join_ranks(
    device: torch.device,
    train: TrainConfig,
    answer: Callable[[BaseException], int] | None = None,
    agreed: tuple[type[BaseException], ...] = (),
) -> Iterator[Ranks]:
    """Join the processes that were started together, as the environment says; without it, be alone.

    A process group that is there already is used and left as it is.

    Args:
        device: "cpu" or "cuda"; each rank takes the GPU of its local number.
        train: where it asks for what FSDP does, one process is a group of its own.
        answer: says what an exception means and gives the exit code, or raises it. One of several processes ends in
            here with it; without this the exception is raised.
        agreed: exceptions that all ranks end with, beside mistakes, signals and those of this file.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and train.precision == "fp32" and not train.cpu_offload:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    ours = not dist.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        rank, store = _meeting_place(size)
        dist.init_process_group(backend, timeout=LONGEST_STEP, store=store, rank=rank, world_size=size)
        assert dist.group.WORLD is not None
        dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(LONGEST_WAIT)
    try:
        yield Ranks(dist.get_rank(), size, init_device_mesh(device.type, (size,)))
    except BaseException as error:
        if ours and size == 1:
            dist.destroy_process_group()
        elif ours and answer:
            _leave(rank, store, error, answer, (*agreed, LeaderFailedError, RecipeError, StoppedError))
        raise
    if ours:
        dist.destroy_process_group()


def _leave(
    rank: int,
    store: dist.Store,
    error: BaseException,
    answer: Callable[[BaseException], int],
    agreed: tuple[type[BaseException], ...],
) -> NoReturn:
    """End one of several processes after a failure.

    The group does not end with it: NCCL would wait for collectives that the other ranks never come to. Where all ranks
    end for one reason, rank 0 goes first, because launchers end those that are left when one is gone; the others take
    its exit code.
    """
    ignore_sigterm()
    try:
        code = answer(error)
    except BaseException:
        print(f"{name_of(rank)} crashed:", file=sys.stderr)
        traceback.print_exception(error)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        # Where the store is gone, rank 0 had it and is gone too.
        with suppress(dist.DistError):
            if rank == 0:
                store.set("ended", str(code))
            elif isinstance(error, agreed):
                store.wait(["ended"], LONGEST_END)
                code = int(store.get("ended"))
    finally:
        # No destructor of the group runs.
        os._exit(code)


def _meeting_place(size: int) -> tuple[int, dist.Store]:
    """This process's rank, and where processes find each other."""
    if size == 1:
        return 0, dist.HashStore()
    store, rank, _ = next(rendezvous("env://"))
    return rank, dist.PrefixStore(agree_on_round(store, rank, size), store)


def agree_on_round(store: dist.Store, rank: int, size: int) -> str:
    """Give all ranks one name that no processes before them had.

    torchrun keeps one store for all starts of its workers, in which those that it starts again would find the addresses
    of dead ones; how often it has started them differs from node to node.

    Args:
        store: what all ranks see, with whatever others have left in it.
        rank: this process's.
        size: how many there are.
    """
    mine = uuid4().hex
    store.set(f"seen {rank}", "")
    store.set(f"name {rank}", mine)
    while True:
        if rank == 0:
            # Some names may still be those of dead ranks, which will see nothing.
            names = " ".join(store.get(f"name {other}").decode() for other in range(size))
            store.set("names", names)
            if all(store.get(f"seen {other}").decode() == names for other in range(1, size)):
                store.set("round", names)
                return _short(names)
        else:
            names = store.get("names").decode()
            if mine in names:
                store.set(f"seen {rank}", names)
            # Asked last: on the first start it is not there before all ranks have seen the names.
            if store.check(["round"]) and mine in (names := store.get("round").decode()):
                return _short(names)
        time.sleep(0.01)


def _short(names: str) -> str:
    # It goes before every key of the store.
    return hashlib.sha256(names.encode()).hexdigest()[:16]
