"""What is measured on a kind of device, and in which order.

Summary    The shapes that matter most. At the first of them every provider and every pass.
Sweeps     The points of the plots: over the vocabularies of real models at H = 4, and over H at one vocabulary; forward
           and backward together, and over vocabularies on a GPU ours also apart. On a GPU with the models' own D; on a
           CPU small, so that all end within minutes.
More       GPU shapes that a tile is chosen by: an aligned vocabulary beside an odd one, few rows, H = 1. No plot and no
           table shows them.

The order is that of what would be missed most, since the suite may run out of its time:

0    the summary of both losses
1    both losses over vocabularies, and the rest
2    both losses over H, and the cross entropy of every row
3    on a GPU, the sweeps of torch.compile, which compiles for seconds for each of them (on a CPU they run beside the
     others, since a shared machine is not the same minutes later)
"""

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.provider import Provider
from benchmarks.providers import PROVIDERS
from benchmarks.shapes import MODELS, Shape

PASSES = {"logits": ("forward", "backward", "both"), "linear": ("both",), "token_ce": ("forward",)}
# The pass of the summary and of the plots.
MAIN_PASS = {"logits": "both", "linear": "both", "token_ce": "forward"}
SWEPT_MODELS = ("Llama-2 7B", "GPT-2", "Llama-3 8B", "Qwen2.5 7B", "Gemma-2 2B")
# On a GPU, too.
LARGEST_MODEL = "Gemma-3 4B"
SWEPT_HORIZONS = (1, 2, 4, 8)
# Of the sweeps: positions, dtype, and the model whose vocabulary the horizons are swept at.
SWEEP = {"cpu": (32, "fp32", "Llama-2 7B"), "cuda": (2048, "bf16", "Llama-3 8B")}
CPU_D, CPU_SWEEP_D = 512, 256
# The neighbour of GPT-2's odd vocabulary.
ALIGNED = "GPT-2, padded"


def shape_of(kind: str, path: str, model: str, S: int, H: int, dtype: str, **more: float) -> Shape:
    """A shape with the D that a kind of device is measured with."""
    D = MODELS[model].D if kind == "cuda" else CPU_D
    return Shape(path, model, S, H, dtype, **{"D": 0 if path == "logits" else D, **more})  # type: ignore[arg-type]


def shown(kind: str, path: str) -> tuple[Shape, ...]:
    """The rows of the README's table: the summary, and on a GPU the linear path of every model."""
    models = over_vocabularies(kind, path) if (kind, path) == ("cuda", "linear") else ()
    return *summary(kind, path), *models


def summary(kind: str, path: str) -> tuple[Shape, ...]:
    """What is measured first."""
    if kind == "cpu":
        main = shape_of(kind, path, "Llama-2 7B", 512, 4, "fp32")
        return {
            "linear": (
                main,
                shape_of(kind, path, "Llama-2 7B", 512, 4, "fp32", prompt=0.4),
                shape_of(kind, path, "Llama-2 7B", 256, 4, "bf16"),
            ),
            "logits": (
                main,
                shape_of(kind, path, "Llama-2 7B", 512, 4, "bf16"),
                shape_of(kind, path, "Llama-2 7B", 128, 4, "fp32", prompt=0.4),
            ),
            "token_ce": (main,),
        }[path]
    main = shape_of(kind, path, "Qwen3 8B", 2048, 4, "bf16")
    dead = shape_of(kind, path, "Qwen3 8B", 2048, 4, "bf16", prompt=0.4)
    if path == "linear":
        return main, dead, shape_of(kind, path, "Qwen3 1.7B", 8192, 4, "bf16")
    return (main, dead) if path == "logits" else (main,)


def over_vocabularies(kind: str, path: str) -> tuple[Shape, ...]:
    """The points of the plots over V, in its order."""
    S, dtype, _ = SWEEP[kind]
    names = SWEPT_MODELS if kind == "cpu" else (*SWEPT_MODELS, LARGEST_MODEL)
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
    few = [shape_of(kind, path, "Qwen3 8B", S, H, "bf16") for S, H in ((256, 1), (64, 4), (8192, 1))]
    return (
        shape_of(kind, path, ALIGNED, 2048, 4, "bf16"),
        *few,
        shape_of(kind, path, "Llama-2 7B", 8192, 1, "bf16"),
    )


class Case(NamedTuple):
    """One provider, one pass, one problem."""

    shape: Shape
    which: str
    provider: Provider
    place: int  # in the order of importance

    def __str__(self) -> str:
        return f"{self.shape}-{self.which}-{self.provider.name}"


def passes(kind: str, path: str, shape: Shape, provider: Provider) -> tuple[str, ...]:
    """What is timed of a provider at a shape: everything, or the main pass alone."""
    whole = shape == summary(kind, path)[0] or shape in more(kind, path)
    # Each kernel has a share of its own to reach, at every vocabulary.
    ours = kind == "cuda" and provider.name == "mtp_ce" and shape in over_vocabularies(kind, path)
    return PASSES[path] if whole or ours else (MAIN_PASS[path],)


def cases(kind: str, path: str) -> Iterator[Case]:
    """All cases of a path: shape by shape, pass by pass."""
    first, horizons = summary(kind, path), over_horizons(kind, path)
    # Neighbours one after the other: they are held against each other.
    early = sorted((*over_vocabularies(kind, path), *more(kind, path)), key=lambda shape: (shape.V, -shape.rows))
    for shape in dict.fromkeys((*first, *early, *horizons)):
        place = 2 if path == "token_ce" else 0 if shape in first else 1 if shape in early else 2
        for which in PASSES[path]:
            for provider in PROVIDERS[path]:
                if which not in passes(kind, path, shape, provider):
                    continue
                if shape == first[0]:
                    yield Case(shape, which, provider, place)
                elif provider.swept:
                    late = provider.compiled and kind == "cuda" and shape not in first
                    yield Case(shape, which, provider, 3 if late else place)
