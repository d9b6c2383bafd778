"""Pin the environment of `uv run` to the versions that are installed: `uv run python scripts/pins.py`.

Run it after the tests have passed. It rewrites `[tool.uv] constraint-dependencies` in pyproject.toml: the direct
dependencies of the package, its extras and its development group, and the indirect ones in `INDIRECT`.
"""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
# A release of one of these has changed what the tests see, or is likely to.
INDIRECT = ("botocore", "huggingface-hub", "s3transfer", "safetensors")
PINS = re.compile(r"^constraint-dependencies = \[\n(.*?)^\]\n", re.DOTALL | re.MULTILINE)


def direct_dependencies(text: str) -> list[Requirement]:
    """Return the requirements of the package, its extras and its development group, without the package itself."""
    tables = tomllib.loads(text)
    project = tables["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values(), tables["dependency-groups"]["dev"]]
    requirements = [Requirement(line) for lines in lists for line in lines]
    return [requirement for requirement in requirements if requirement.name != project["name"]]


def pins(text: str) -> dict[str, str]:
    """Return the pinned version of every name."""
    constraints = tomllib.loads(text)["tool"]["uv"].get("constraint-dependencies", [])
    return dict(line.split("==") for line in constraints)


def without_pins(text: str) -> str:
    """Return pyproject.toml with the package's own ranges only."""
    return PINS.sub("", text)


def pinned(text: str) -> str:
    """Return pyproject.toml with the versions that are installed here; a local version part (`+cpu`) is dropped."""
    names = sorted({requirement.name.lower() for requirement in direct_dependencies(text)} | {*INDIRECT})
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    lines = "".join(f'    "{name}=={version}",\n' for name, version in versions.items())
    return PINS.sub(lambda _: f"constraint-dependencies = [\n{lines}]\n", text)


if __name__ == "__main__":
    PYPROJECT.write_text(pinned(PYPROJECT.read_text()))
