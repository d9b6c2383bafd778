"""The cases of a kind of device, in their order: by default the shapes that matter most, with --full all of them.

Summary    The shapes of the table in docs/benchmarks.md. At the first of a path every pass and, on a CPU with --full,
           every provider.
Sweeps     The points of the plots: over the vocabularies of real models at H = 4, and over H at one vocabulary. On a
           GPU with the models' own D, and this project's passes apart at every vocabulary; on a CPU small.
More       On a GPU, shapes that a tile is chosen by: an aligned vocabulary beside an odd one, few rows, H = 1.

The order is that of importance, since a GPU's time may run out: the summaries first, then the rest. Cases of one shape
stand together, so that they meet the machine in one state.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.providers import BY_NAME, PROVIDERS, Provider
from benchmarks.shapes import DISTRIBUTIONS, MODELS, PROMPT, Shape

PATHS = ("linear", "logits", "token_ce")
PASSES = {"logits": ("forward", "backward", "both"), "linear": ("both",), "token_ce": ("forward",)}
# The pass of the tables and of the plots.
MAIN_PASS = {"logits": "both", "linear": "both", "token_ce": "forward"}
SWEPT_MODELS = ("Llama-2 7B", "GPT-2", "Llama-3 8B", "Qwen2.5 7B", "Gemma-2 2B")
SWEPT_HORIZONS = (1, 2, 4, 8)
# Of the sweeps: positions, dtype, and the model whose vocabulary the horizons are swept at.
SWEEP = {"cpu": (32, "fp32", "Llama-2 7B"), "cuda": (2048, "bf16", "Llama-3 8B")}
CPU_D, CPU_SWEEP_D = 512, 256
# Measured by default at every shape of a CPU's summary; other providers at the first shape of a path. Of logits also
# the compiled loop: bf16 and few rows have their own ratio to it.
ALWAYS = ("bare_products", "mtp_ce", "mtp_ce_inplace", "eager_loop")
ALWAYS_LOGITS = (*ALWAYS, "compiled_loop")


class Case(NamedTuple):
    """One provider, one pass, one shape."""

    shape: Shape
    which: str
    provider: Provider

    def __str__(self) -> str:
        return f"{self.shape.path}-{self.shape}-{self.which}-{self.provider.name}"


def shape_of(kind: str, path: str, model: str, S: int, H: int, dtype: str, **more: float | str) -> Shape:
    """Return a shape with the D that this kind of device is measured with."""
    D = MODELS[model].D if kind == "cuda" else CPU_D
    return Shape(path, model, S, H, dtype, **{"D": 0 if path == "logits" else D, **more})  # type: ignore[arg-type]


def summary(kind: str, path: str) -> tuple[Shape, ...]:
    """The shapes that are measured first."""
    if kind == "cpu":
        model, dtype, S, few = "Llama-2 7B", "fp32", 512, 128
        others = {
            "linear": [(S, {"prompt": PROMPT}), (S // 2, {"dtype": "bf16"})],
            "logits": [(S, {"dtype": "bf16"}), (32, {"H": 1}), (few, {"prompt": PROMPT})],
            "token_ce": [],
        }[path]
    else:
        model, dtype, S, few = "Qwen3 8B", "bf16", 2048, 2048
        others = [] if path == "token_ce" else [(S, {"prompt": PROMPT})]
    if path == "logits":
        dtypes = ("fp32", "bf16") if kind == "cpu" else (dtype,)
        others += [(few, {"distribution": name, "dtype": each}) for name in DISTRIBUTIONS[1:] for each in dtypes]
    shapes = [shape_of(kind, path, model, S, 4, dtype)]
    for positions, more in others:
        shapes.append(shape_of(kind, path, model, positions, **{"H": 4, "dtype": dtype, **more}))  # type: ignore[arg-type]
    if (kind, path) == ("cuda", "linear"):
        shapes.append(shape_of(kind, path, "Qwen3 1.7B", 8192, 4, dtype))
    return tuple(shapes)


def over_vocabularies(kind: str, path: str) -> tuple[Shape, ...]:
    """The points of the plots over V."""
    S, dtype, _ = SWEEP[kind]
    names = (*SWEPT_MODELS, "Gemma-3 4B") if kind == "cuda" else SWEPT_MODELS
    models = sorted(names, key=lambda model: MODELS[model].V)
    return tuple(_swept(kind, path, model, S, 4, dtype) for model in models)


def over_horizons(kind: str, path: str) -> tuple[Shape, ...]:
    """The points of the plots over H."""
    S, dtype, model = SWEEP[kind]
    return tuple(_swept(kind, path, model, S, H, dtype) for H in SWEPT_HORIZONS)


def _swept(kind: str, path: str, model: str, S: int, H: int, dtype: str) -> Shape:
    small = {"D": CPU_SWEEP_D} if kind == "cpu" and path != "logits" else {}
    return shape_of(kind, path, model, S, H, dtype, **small)


def more(kind: str, path: str) -> tuple[Shape, ...]:
    """Shapes without a plot."""
    if (kind, path) != ("cuda", "logits"):
        return ()
    few = [("Qwen3 8B", 256, 1), ("Qwen3 8B", 64, 4), ("Qwen3 8B", 8192, 1), ("Llama-2 7B", 8192, 1)]
    return tuple(shape_of(kind, path, *size, "bf16") for size in [("GPT-2, padded", 2048, 4), *few])


def shown(kind: str, path: str) -> tuple[Shape, ...]:
    """The rows of the table of docs/benchmarks.md: the summary, and on a GPU the linear path of every model."""
    return *summary(kind, path), *(over_vocabularies(kind, path) if (kind, path) == ("cuda", "linear") else ())


def cases(kind: str, full: bool) -> Iterator[Case]:
    """Yield the cases of all paths: the summaries, then with `full` the rest; shape by shape, pass by pass."""
    for path in PATHS:
        main, *others = summary(kind, path)
        swept = [provider for provider in PROVIDERS[path] if provider.swept]
        yield from _cases(main, PASSES[path], PROVIDERS[path] if full or kind == "cuda" else swept)
        if kind == "cpu" and not full:
            always = ALWAYS_LOGITS if path == "logits" else ALWAYS
            swept = [BY_NAME[path][name] for name in always if name in BY_NAME[path]]
        for shape in others:
            yield from _cases(shape, (MAIN_PASS[path],), swept)
    if not full:
        return
    for path in PATHS:
        swept = [provider for provider in PROVIDERS[path] if provider.swept]
        vocabularies, first = over_vocabularies(kind, path), summary(kind, path)
        early = sorted((*vocabularies, *more(kind, path)), key=lambda shape: (shape.V, -shape.rows))
        for shape in dict.fromkeys((*early, *over_horizons(kind, path))):
            if shape in first:
                continue
            # On a GPU each kernel has its own share of the ceiling at every vocabulary.
            apart = kind == "cuda" and shape in early
            if apart:
                passes = [which for which in PASSES[path] if which != MAIN_PASS[path]]
                yield from _cases(shape, passes, [BY_NAME[path]["mtp_ce"]])
            yield from _cases(shape, (MAIN_PASS[path],), swept)


def _cases(shape: Shape, passes: Sequence[str], providers: Sequence[Provider]) -> Iterator[Case]:
    for which in passes:
        for provider in providers:
            yield Case(shape, which, provider)
