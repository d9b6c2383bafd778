"""From a recipe to a trained model on disk: makes the parts, connects them, runs them."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from mtp_ce.scorers.uniform import UniformScorer
from mtp_ce.scorers.weights import Scorer
from mtp_ce.training.checkpoint import save_model
from mtp_ce.training.corpus import find_files, read_corpus, texts
from mtp_ce.training.data import PackedRows, TokenisedCorpus, tokenise, unigram_cross_entropy
from mtp_ce.training.interrupt import stop_on_interrupt
from mtp_ce.training.model import MultiTokenModel, build_model
from mtp_ce.training.optimizer import build_optimizer, build_schedule
from mtp_ce.training.recipe import to_yaml, without_password
from mtp_ce.training.report import Display, results_table
from mtp_ce.training.schema import Recipe, RecipeError, UniformScorerConfig
from mtp_ce.training.sums import HeadResult
from mtp_ce.training.tokenizer import load_tokenizer
from mtp_ce.training.tracking import METRICS_FILE, Tracking
from mtp_ce.training.trainer import Trainer


def describe(recipe: Recipe, output: Path) -> None:
    """Print what `train` would do, without memory for the model and without writing anything.

    Raises:
        RecipeError: the corpus is not there.
    """
    console = _console()
    root, paths = find_files(recipe.data)
    with torch.device("meta"):
        model = build_model(recipe)
    train, data = recipe.train, recipe.data
    step_tokens = train.batch_size * data.sequence_length
    _say(console, f"recipe      {recipe.name}: {recipe.description}")
    _say(console, f"corpus      {len(paths)} files in {root}, {data.holdout_fraction:.1%} held out")
    _say(console, f"model       {_parameters(model)}")
    _say(
        console,
        f"training    {train.steps:,} steps of {train.batch_size} x {data.sequence_length} = {step_tokens:,} "
        f"tokens: {train.steps * step_tokens:,} in all, for {recipe.model.mtp.horizon} heads",
    )
    _say(console, f"device      {_device(recipe)}")
    _say(console, f"output      {output}")
    _say(console, f"tracking    {_tracking(recipe)}")
    _say(console, "dry run: nothing was written")


def train(recipe: Recipe, output: Path) -> list[HeadResult]:
    """Run a recipe from the corpus to the saved model.

    Args:
        recipe: what to do.
        output: folder to make; it must not exist.

    Returns:
        The validation after the last step, one result per head.

    Raises:
        RecipeError: the corpus or the output folder does not fit the recipe.
        NonFiniteError: loss or gradient was not finite; the step was not taken.
        KeyboardInterrupt: Ctrl-C; the metrics so far are kept.
    """
    # transformers would draw bars of its own for files that take milliseconds.
    transformers_logging.disable_progress_bar()
    console, device = _console(), _device(recipe)
    tokenizer, tokens = _tokens(recipe, console)
    pad = tokenizer.pad_token_id
    rows = PackedRows(tokens.train, recipe.data.sequence_length, pad)
    held_out = PackedRows(tokens.held_out, recipe.data.sequence_length, pad)
    unigram = unigram_cross_entropy(tokens, recipe.data.vocab_size)

    torch.manual_seed(recipe.seed)
    model = build_model(recipe, end_of_text=tokenizer.eos_token_id).to(device)
    _say(console, f"model       {_parameters(model)}; on {device}")
    _make_folder(output)
    (output / "recipe.yaml").write_text(to_yaml(without_password(recipe)), encoding="utf-8")
    _say(console, f"output      {output}")

    optimizer = build_optimizer(model, recipe.optimizer)
    display = Display(console, recipe.train.steps)
    with Tracking(recipe, output, display.warn) as tracking:
        tracking.artifact(output / "recipe.yaml")

        def log(step: int, metrics: dict[str, float]) -> None:
            tracking.log(step, metrics)
            display.show(step, metrics)

        with display, stop_on_interrupt() as stop:
            results = Trainer(
                recipe=recipe,
                model=model,
                scorer=_scorer(recipe.scorer),
                optimizer=optimizer,
                schedule=build_schedule(optimizer, recipe.optimizer, recipe.train.steps),
                rows=rows,
                held_out=held_out,
                device=device,
                log=log,
                tick=display.tick,
                stop=stop,
            ).fit()
        tracking.log(recipe.train.steps, {"val/unigram_entropy": unigram})
        save_model(output / "model", model, tokenizer)
        # matplotlib writes a font cache when it is first imported; a dry run writes nothing.
        from mtp_ce.training.plot import draw_losses

        draw_losses(
            output / METRICS_FILE,
            output / "losses.png",
            f"{output.name}: cross entropy of each head",
            unigram,
        )
        tracking.artifact(output / "losses.png")

    console.print(results_table(results, unigram))
    _say(
        console,
        "unigram entropy: held-out tokens under the frequencies of the training tokens, add-one smoothed",
    )
    _say(
        console,
        f"saved       {output}/model (model, tokenizer, heads), losses.png, {METRICS_FILE}, recipe.yaml",
    )
    _say(console, f"tracking    {_tracking(recipe)}")
    return results


def _tokens(recipe: Recipe, console: Console) -> tuple[PreTrainedTokenizerFast, TokenisedCorpus]:
    corpus = read_corpus(recipe.data)
    _say(
        console,
        f"corpus      {len(corpus.train)} files to train on, {len(corpus.held_out)} held out, "
        f"{corpus.characters / 1e6:.1f} million characters",
    )
    tokenizer = load_tokenizer(texts(corpus.train), recipe.data.vocab_size)
    tokens = tokenise(corpus, tokenizer)
    counts = [sum(len(document) for document in side) for side in (tokens.train, tokens.held_out)]
    _say(
        console,
        f"tokens      {counts[0]:,} to train on, {counts[1]:,} held out, {len(tokenizer):,} entries",
    )
    return tokenizer, tokens


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True)
    except OSError as error:
        raise RecipeError(f"output folder {output} can't be made: {error.strerror}; see --output") from None


def _scorer(config: UniformScorerConfig) -> Scorer:
    match config:
        case UniformScorerConfig():
            return UniformScorer()


def _device(recipe: Recipe) -> torch.device:
    wanted = recipe.train.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError("train.device is 'cuda', but torch finds no GPU; give train.device=auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _parameters(model: MultiTokenModel) -> str:
    trunk = sum(parameter.numel() for parameter in model.trunk.parameters())
    heads = sum(parameter.numel() for parameter in model.heads.parameters())
    return f"{trunk + heads:,} parameters: trunk {trunk:,}, extra heads {heads:,}"


def _tracking(recipe: Recipe) -> str:
    if recipe.tracking.kind == "none":
        return f"none; metrics go to {METRICS_FILE}"
    return f"mlflow ui --backend-store-uri {without_password(recipe).tracking.uri}"


def _console() -> Console:
    return Console()


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)
