"""`train-mtp --dry-run`: print steps, sizes and reachable services of a run in seconds, without writing anything."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal, pick_unit_and_suffix
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mtp_ce.heads.kinds import is_in_model
from mtp_ce.training.config.model import PretrainedModelConfig
from mtp_ce.training.config.recipe import flatten
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.console import say
from mtp_ce.training.data.reader import find_corpus
from mtp_ce.training.errors import refuse_unloadable
from mtp_ce.training.loop.ranks import Ranks, check_groups
from mtp_ce.training.loop.weighing import MODEL_CLASSES
from mtp_ce.training.models.build import checkpoint_activations, llama_config, with_heads
from mtp_ce.training.models.gguf import converted_folder
from mtp_ce.training.models.sizing import forward_products, step_memory, step_products
from mtp_ce.training.models.sources import local_source, sources_of
from mtp_ce.training.models.tensor_parallel import keep_share
from mtp_ce.training.run.fitting import parameters
from mtp_ce.training.run.inputs import find_device
from mtp_ce.training.tracking.composite import describe_tracking

FLOPS = ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"]


def dry_run(recipe: Recipe, output: Path, out: Console | None = None) -> None:
    """Print what `train` would do, without memory for the model and without writing anything.

    Of several ranks, rank 0 prints for all.

    Args:
        recipe: the run.
        output: the run directory that would be created.
        out: where to print; None means the terminal.

    Raises:
        RecipeError: a text can't be read, an address in S3 can't be reached, or a batch is not divisible by the ranks.
    """
    train, data = recipe.train, recipe.data
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    ranks = Ranks(rank, size, tensor_parallel=train.tensor_parallel)
    if not ranks.leads:
        return
    out = out or Console()
    check_groups(size, train.tensor_parallel)
    ranks.check_batch(train.batch_size, train.micro_batch_size)
    if recipe.reference and recipe.reference.train:
        ranks.check_batch(recipe.reference.train.batch_size, recipe.reference.train.micro_batch_size)
    device = find_device(train.device, "train.device")
    # Checks come first, so that an error is the only line printed.
    corpus, addresses = _corpus(recipe), _addresses(recipe)
    say(out, f"recipe      {recipe.name}: {recipe.description}")
    say(out, f"corpus      {corpus}")
    if data.noise:
        say(out, f"noise       {data.noise.share:.1%} of the tokens to train on: {data.noise.describe()}")
    for key, (source, kind) in sources_of(recipe).items():
        say(out, f"source      {key}: {kind} {source}")
    for key, address in addresses.items():
        say(out, f"reachable   {key}: {address}")
    for line in _stages(recipe):
        say(out, line)
    say(out, f"scorer      {recipe.scorer.name}{', before training' if recipe.precompute_weights else ''}")
    step_tokens = train.batch_size * data.sequence_length
    say(
        out,
        f"training    {train.steps:,} steps of {train.batch_size} x {data.sequence_length} = {step_tokens:,} "
        f"tokens: {train.steps * step_tokens:,} in total, for {recipe.model.mtp.horizon} heads",
    )
    shared = f", groups of {ranks.tensor_parallel} share the layers" if ranks.tensor_parallel > 1 else ""
    say(out, f"device      {device}{f', {ranks.size} ranks{shared}' if ranks.size > 1 else ''}")
    _print_sizes(out, recipe, device, ranks)
    say(out, f"output      {output}")
    say(out, f"tracking    {describe_tracking(recipe.tracking)}")
    say(out, "dry run: nothing was written")


def _corpus(recipe: Recipe) -> str:
    data = recipe.data
    reader = find_corpus(data)
    return f"{reader.describe()}, {data.validation_corpus or f'{data.holdout_fraction:.1%}'} held out"


def _addresses(recipe: Recipe) -> dict[str, str]:
    """Return the S3 addresses that a recipe names, after checking that each can be reached."""
    addresses = {key: value for key, value in flatten(recipe).items() if str(value).startswith("s3://")}
    if addresses:
        # boto3 takes a second to load, and most recipes name nothing in S3.
        from mtp_ce.training.storage.folders import check_address, check_writable

        for key, address in addresses.items():
            (check_writable if key == "checkpoint.upload" else check_address)(key, address)
    return addresses


def _stages(recipe: Recipe) -> list[str]:
    lines = []
    for model in recipe.frozen_models():
        stage = None if model.source else getattr(recipe, model.role)
        if stage:
            steps = f"{stage.train.steps:,} steps of {stage.train.batch_size}"
            lines.append(f"{model.role:<11} {steps}, where not there already")
    return lines


def _print_sizes(out: Console, recipe: Recipe, device: torch.device, ranks: Ranks) -> None:
    config = _trunk_config(recipe)
    if config is None:
        say(out, "model       size unknown: the model is not on this machine, and a dry run downloads nothing")
        return
    heads, train, S = recipe.model.mtp, recipe.train, recipe.data.sequence_length
    if is_in_model(heads.kind):  # the same form; one module, whose files are not read
        heads = heads.model_copy(update={"kind": "sequential", "shared": True})
    with refuse_unloadable("model", recipe.model.kind, "can't be built"), torch.device("meta"):
        trunk = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model = with_heads(trunk, heads)
    scoring, unknown = _scoring_models(recipe, config)
    frozen = "" if heads.trunk == "joint" else "; only the heads are trained"
    say(out, f"model       {parameters(model)}{frozen}")
    for key in unknown:
        say(out, f"            {key} is not counted below: it is not on this machine")

    if recipe.precompute_weights:
        scoring = {}
    products = replace(step_products(model, S), scoring=_scoring_products(recipe, config, scoring, unknown))
    tokens = train.steps * train.batch_size * S
    items = (f"{name} {_flops(value)}" for name, value in vars(products).items() if value)
    say(out, f"compute     {_flops(products.total)} per token: {', '.join(items)}")
    say(out, f"            {_flops(products.total * tokens)} in total for the last stage")

    rows = train.micro_batch_size or train.batch_size // ranks.data_size
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    if train.activation_checkpointing:
        checkpoint_activations(model)
    if ranks.tensor_parallel > 1:
        keep_share(model, ranks.tensor_parallel)
    memory, loss = step_memory(
        model, scoring.values(), rows, S, device, ranks.data_size, dtype=dtype, offload=train.cpu_offload
    )
    items = (f"{name} {decimal(value)}" for name, value in vars(memory).items() if value)
    whose = f"a rank of {ranks.size}" if ranks.size > 1 else "one process"
    say(out, f"memory      {decimal(memory.total)} for {whose}, {rows} x {S} tokens at a time: {', '.join(items)}")
    say(
        out,
        f"loss        linear {decimal(loss.linear)} ({loss.chunk_rows:,} rows of logits at a time), "
        f"logits {decimal(loss.logits)}, eager torch {decimal(loss.eager)}; the recipe uses {heads.loss}",
    )
    if device.type == "cuda":
        say(out, f"fits        {_fits(memory.total)}")


def _scoring_products(
    recipe: Recipe, trunk: PreTrainedConfig, scoring: dict[str, PreTrainedModel], unknown: list[str]
) -> int:
    """Return the FLOPs of one token's weight."""
    flops = sum(forward_products(model, recipe.data.sequence_length) for model in scoring.values())
    if recipe.precompute_weights or unknown:
        return flops
    sizes = trunk.get_text_config()
    return flops + recipe.scorer.flops_per_token(sizes.vocab_size, sizes.hidden_size, recipe.model.mtp.horizon)


def _fits(needed: int) -> str:
    index = int(os.environ.get("LOCAL_RANK", "0"))
    free, _ = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    if needed < free:
        return f"yes: {decimal(free)} free on {name}"
    return f"no: {decimal(free)} free on {name}; lower train.micro_batch_size, or start more ranks"


def _trunk_config(recipe: Recipe) -> PreTrainedConfig | None:
    """Return the configuration of the model in training; None if it is not on this machine."""
    if not isinstance(recipe.model, PretrainedModelConfig):
        return llama_config(recipe.model, recipe.data)
    return _config_of("model.source", recipe.model.source)


def _config_of(key: str, source: str) -> PreTrainedConfig | None:
    path = local_source(key, source)
    options: dict[str, Any] = {}
    if path and path.is_file():
        converted = converted_folder(path)
        path, options = (converted, {}) if converted.exists() else (path.parent, {"gguf_file": path.name})
    if path is None:
        return None
    with refuse_unloadable(key, source):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
    return config


def _scoring_models(recipe: Recipe, trunk: PreTrainedConfig) -> tuple[dict[str, PreTrainedModel], list[str]]:
    """The frozen models of the scorer, without memory, and the keys of those that are not on this machine."""
    models: dict[str, PreTrainedModel] = {}
    unknown = []
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    for frozen in recipe.frozen_models():
        if frozen.source:
            config = _config_of(frozen.key, frozen.source)
        else:
            # It has the vocabulary of the model in training, and its sizes unless the recipe gives others.
            data = recipe.data.model_copy(update={"vocab_size": trunk.get_text_config().vocab_size})
            sizes = getattr(recipe, frozen.role).model
            config = llama_config(sizes, data) if sizes else trunk
        if config is None:
            unknown.append(frozen.key)
            continue
        with refuse_unloadable(frozen.key, frozen.source or frozen.role), torch.device("meta"):
            models[frozen.role] = MODEL_CLASSES[frozen.kind].from_config(config, dtype=dtype, trust_remote_code=False)
    return models, unknown


def _flops(count: int) -> str:
    unit, suffix = pick_unit_and_suffix(count, FLOPS, 1000)
    return f"{count / unit:,.1f} {suffix}"
