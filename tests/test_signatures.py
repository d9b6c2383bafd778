"""Options and inputs travel as objects: no argument list grows with every option of the loss."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtp_ce.options import OPTION_NAMES, LossOptions

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "mtp_ce", "training", "benchmarks")
MOST, MOST_OF_A_KERNEL, MOST_NAMING_AN_OPTION = 12, 20, 8
# Their arguments are the API: one keyword an option.
PUBLIC = {
    "weighted_mtp_ce", "weighted_mtp_linear_ce", "token_ce", "reference_weighted_mtp_ce",
    "WeightedMTPLoss", "MTPWrapper", "WrapperFiles", "MTPTrainer", "MTPHeads", "UniformScorer", "Rho1ExcessScorer",
    "CriticDeltaScorer", "DraftRejectionScorer", "ShuffledWeights", "RandomMatchedWeights", "normalize_weights",
}  # fmt: skip

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, str, Function]]:
    """Name, class and node of every function of a file, nested ones too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node.name, owner, node
            yield from functions(node, owner)
        else:
            yield from functions(node, node.name if isinstance(node, ast.ClassDef) else owner)


def parameters(node: Function) -> list[str]:
    """The names of all parameters, self and cls left out."""
    arguments = node.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    names += [argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return [name for name in names if name not in ("self", "cls")]


def decorators(node: Function) -> set[str]:
    """The last names of the decorators: `triton.jit` is "jit", `operator(fake=...)` is "operator"."""
    called = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return {ast.unparse(d).rpartition(".")[2] for d in called}


def signatures() -> Iterator[tuple[str, str, str, list[str], set[str]]]:
    """Where, name, class, parameters and decorators of every function of the package and the benchmarks."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if any(part.is_symlink() for part in path.parents):
                continue
            for name, owner, node in functions(ast.parse(path.read_text())):
                where = f"{path.relative_to(ROOT)}:{node.lineno} {name}"
                yield where, name, owner, parameters(node), decorators(node)


def test_no_function_has_more_parameters_than_a_reader_can_hold() -> None:
    """12, or 20 for a kernel; public functions name every option."""
    too_many = []
    for where, name, owner, names, decorated in signatures():
        kernel = "jit" in decorated and name.endswith("_kernel")
        if name in PUBLIC or owner in PUBLIC:
            continue
        if len(names) > (MOST_OF_A_KERNEL if kernel else MOST):
            too_many.append(f"{where} has {len(names)}")
    assert not too_many


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss"])
def test_an_option_of_the_loss_is_named_in_few_signatures(option: str) -> None:
    """Those of public functions and of the oracle: everything else takes `LossOptions`."""
    naming = [where for where, _, _, names, _ in signatures() if option in names]
    assert 1 <= len(naming) <= MOST_NAMING_AN_OPTION, naming


def test_the_options_keep_the_order_of_their_fields() -> None:
    """`values` and `from_values` are what operators' schemas rest on."""
    options = LossOptions(2, 1, "target", "horizon", -1, "sum", 0.5, 30.0, 1e-4, 0.1)
    assert options.values() == tuple(getattr(options, name) for name in OPTION_NAMES)
    assert LossOptions.from_values(*options.values()) == options
