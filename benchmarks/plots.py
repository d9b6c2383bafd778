"""The plots: time and memory of every provider and the ceiling, over the vocabularies of real models and over H.

One figure for a device and a path, and one of peak memory alone for the README. SVG with text as text; the same results
produce the same bytes.
"""

from pathlib import Path
from typing import Any

from benchmarks import cases, results
from benchmarks.providers import BY_NAME, PROVIDERS
from benchmarks.shapes import MODELS, Shape

MIB = 2**20

TITLES = {
    "linear": "weighted_mtp_linear_ce, forward and backward",
    "logits": "weighted_mtp_ce, forward and backward",
    "token_ce": "token_ce, forward",
}
CEILINGS = {"linear": "bare matrix products", "logits": "copy of the bytes", "token_ce": "bare matrix product"}
EXTRA = {
    "linear": "peak MiB besides inputs, gradients",
    "logits": "peak MiB besides the inputs",
    "token_ce": "peak MiB besides the inputs",
}
STYLES = {
    "mtp_ce": ("#0b62c4", "o", "-"),
    "mtp_ce_inplace": ("#0b62c4", "s", "--"),
    "eager_loop": ("#7f7f7f", "v", "-"),
    "compiled_loop": ("#e08214", "^", "-"),
    "torch_chunked": ("#2f8f2f", "D", "-"),
    "liger": ("#8e44ad", "P", "-"),
    "liger_4096": ("#8e44ad", "p", "--"),
    "liger_rows": ("#8e44ad", "P", "-"),
    "liger_heads": ("#8e44ad", "p", "--"),
    "cce": ("#b2182b", "X", "-"),
}

# Bars of the memory figure: provider -> its name in words.
BARS = {
    "eager_loop": "eager PyTorch",
    "compiled_loop": "torch.compile",
    "torch_chunked": "torch, chunked",
    "liger": "Liger",
    "cce": "cut-cross-entropy",
    "mtp_ce": "mtp_ce",
    "mtp_ce_inplace": "mtp_ce, in place",
}
SOURCES = {
    "logits": "from logits\n(the gradient alone: {} MiB)",
    "linear": "from hidden states\n(the gradients alone: {} MiB)",
}

Points = dict[int, dict[str, Any]]  # index on the axis -> case


def label(path: str, provider: str) -> str:
    """Return a provider's name, with a dagger where it does less work."""
    known = BY_NAME[path].get(provider)
    return provider + ("†" if known is not None and not known.weighted else "")


def points(runs: list[results.Run], shapes: tuple[Shape, ...], provider: str) -> Points:
    """Return the newest case of a provider at each shape that has one."""
    newest: Points = {}
    for i, shape in enumerate(shapes):
        wanted = provider, cases.MAIN_PASS[shape.path], shape.as_dict()
        for case in (case for run in runs for case in run["cases"]):
            if (case["provider"], case["pass"], case["shape"]) == wanted:
                newest[i] = case
    return newest


def extra_bytes(case: dict[str, Any]) -> int:
    """Return the peak above the inputs; on the linear path above the gradients too, which every provider returns."""
    shape = case["shape"]
    return int(case["peak_bytes"] - (shape["gradient_bytes"] if shape["path"] == "linear" else 0))


def drawable(runs: list[results.Run], path: str) -> bool:
    """Whether mtp_ce has enough points for lines."""
    kind = runs[-1]["kind"]
    sweeps = cases.over_vocabularies(kind, path), cases.over_horizons(kind, path)
    return all(len(points(runs, shapes, "mtp_ce")) > 1 for shapes in sweeps)


def _tick(shape: Shape, over: str) -> str:
    if over == "H":
        return str(shape.H)
    width = f"\nD {shape.D}" if shape.D and shape.D == MODELS[shape.model].D else ""
    cap = f"\nsoftcap {shape.softcap:g}" if shape.softcap else ""
    return f"{shape.model}\nV {shape.V}{width}{cap}"


def _panel(axes: Any, runs: list[results.Run], shapes: tuple[Shape, ...], what: str) -> None:
    """Draw a line for each provider, and the ceiling of the time, or the size of all logits."""
    path = shapes[0].path
    for provider in PROVIDERS[path]:
        line = points(runs, shapes, provider.name)
        if not line or provider.name not in STYLES:
            continue
        color, marker, dashes = STYLES[provider.name]
        values = [case["p20_ms"] if what == "time" else extra_bytes(case) / MIB for case in line.values()]
        axes.plot(
            list(line), values, dashes, color=color, marker=marker, markersize=5,
            linewidth=2.2 if provider.ours else 1.3, zorder=3 if provider.ours else 2,
            label=label(path, provider.name),
        )  # fmt: skip
    if what == "time":
        line = {i: case for i, case in points(runs, shapes, "mtp_ce").items() if case["ceiling_ms"]}
        values = [case["ceiling_ms"] for case in line.values()]
        axes.plot(list(line), values, ":", color="black", linewidth=1.6, label=f"ceiling: {CEILINGS[path]}")
    else:
        values = [shape.logits_bytes / MIB for shape in shapes]
        axes.plot(range(len(shapes)), values, "-.", color="#444444", linewidth=1.1, label="size of all logits")
    axes.set_yscale("log")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def memory_shapes(runs: list[results.Run]) -> list[Shape]:
    """Return the shapes of the memory figure that mtp_ce was measured at: the first one of each path with gradients."""
    shapes = [cases.summary(runs[-1]["kind"], path)[0] for path in SOURCES]
    return [shape for shape in shapes if points(runs, (shape,), "mtp_ce")]


def draw_memory(runs: list[results.Run], file: Path) -> None:
    """Write a figure with a bar for each provider: the peak above the inputs, forward and backward."""
    pyplot = _pyplot(font_size=10)
    figure, axes = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    shapes, ticks, y = memory_shapes(runs), {}, 0
    for shape in shapes:
        bars = {name: case for name in BARS for case in points(runs, (shape,), name).values()}
        widest = max(case["peak_bytes"] for case in bars.values()) / MIB
        text = SOURCES[shape.path].format(f"{shape.gradient_bytes / MIB:.0f}")
        axes.text(1, y + len(bars) / 2 - 0.5, text, transform=axes.get_yaxis_transform(), ha="right", color="#444444")
        for name, case in bars.items():
            peak, ours = case["peak_bytes"] / MIB, name.startswith("mtp_ce")
            axes.barh(y, peak, color="#0b62c4" if ours else "#b8bec6", height=0.72)
            axes.text(peak + 8, y, f"{peak:.0f} MiB", va="center", fontweight="bold" if ours else "normal")
            ticks[y] = BARS[name]
            y += 1
        axes.set_xlim(0, max(axes.get_xlim()[1], widest * 1.15))
        y += 1
    axes.set_yticks([*ticks], [*ticks.values()])
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    first = shapes[0]
    size = f"{first.H} heads, {first.rows // first.H} tokens, V = {first.V}, {first.dtype}"
    title = f"Peak memory above the inputs, forward and backward: {size}, {runs[-1]['device']}"
    figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    _save(figure, file)


def _pyplot(font_size: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "mtp_ce", "svg.fonttype": "none", "font.size": font_size})
    return pyplot


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    metadata = {"Date": None, "Creator": None} if file.suffix == ".svg" else None
    figure.savefig(file, metadata=metadata, facecolor="white", dpi=100)
    pyplot.close(figure)


def draw(runs: list[results.Run], path: str, file: Path) -> None:
    """Write one figure, in the format of the file's suffix."""
    pyplot = _pyplot(font_size=9)
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    run, kind = runs[-1], runs[-1]["kind"]
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 7.4), width_ratios=(5, 4), layout="constrained")
    sweeps = (("V", cases.over_vocabularies(kind, path)), ("H", cases.over_horizons(kind, path)))
    for column, (over, shapes) in enumerate(sweeps):
        for row, what in enumerate(("time", "memory")):
            axes = grid[row][column]
            _panel(axes, runs, shapes, what)
            axes.set_xticks(range(len(shapes)), [_tick(shape, over) for shape in shapes])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_ylabel("ms, p20" if what == "time" else EXTRA[path])
        first, last = shapes[0], shapes[-1]
        fixed = f"H = {first.H}" if over == "V" else f"V = {first.V}"
        rows = f"N = {first.rows}" if first.rows == last.rows else f"N = {first.rows} to {last.rows}"
        width = f", D = {first.D}" if first.D and first.D == last.D else ""
        grid[0][column].set_title(f"over {over}: {fixed}, {rows}{width}", fontsize=9.5)
        grid[1][column].set_xlabel("vocabulary" if over == "V" else "H, heads")
    lines = {text: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.suptitle(f"{TITLES[path]}, {shapes[0].dtype}: {run['device']}", fontsize=12)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    _save(figure, file)
