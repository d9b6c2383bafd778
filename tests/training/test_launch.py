"""Ways to start several processes: torchrun on two machines, torchrun that starts workers again, accelerate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mtp_ce.training import pipeline
from mtp_ce.training.recipe import to_yaml
from mtp_ce.training.schema import Recipe

TORCHRUN = f"{sys.executable} -m torch.distributed.run"
TRAIN = f"{Path(sys.executable).parent / 'train-mtp'} recipe.yaml"

# Two machines as network namespaces, each with an address of its own, joined by a cable.
TWO_NODES = f"""
set -e
mount -t tmpfs tmpfs /run
for node in left right; do ip netns add $node; ip -n $node link set lo up; done
ip link add cable netns left type veth peer name cable netns right
ip -n left address add 10.9.0.1/24 dev cable
ip -n right address add 10.9.0.2/24 dev cable
for node in left right; do ip -n $node link set cable up; done
node() {{
    ip netns exec $1 {TORCHRUN} --nnodes 2 --nproc-per-node 1 --local-addr $2 --rdzv-id test --rdzv-backend c10d \\
        --rdzv-endpoint 10.9.0.1:29400 --rdzv-conf is_host=$3 --no-python {TRAIN} --output out
}}
node right 10.9.0.2 0 &
node left 10.9.0.1 1
wait $!
"""

# The second rank is killed in its fourth step, once.
MORTAL = """
import os, signal, sys
from mtp_ce.training import fitting
from mtp_ce.training.cli import main

class Mortal(fitting.Trainer):
    def _step(self, step, window):
        if step == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        super()._step(step, window)

fitting.Trainer = Mortal
sys.exit(main())
"""


@pytest.fixture(scope="module")
def recipe(small) -> Recipe:
    options = ["train.steps=5", "train.log_every=1", "validation.every=2", "data.sequence_length=48", "name=launched"]
    return small([*options, "validation.decoding.prompts=0", "checkpoint.every=2"])


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    pipeline.train(recipe, folder, Console(quiet=True))
    return folder


def start(command: list[str], where: Path, recipe: Recipe, **environment: str) -> str:
    """Run a command to its end; give what it said."""
    (where / "recipe.yaml").write_text(to_yaml(recipe))
    with subprocess.Popen(
        command, cwd=where, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as run:  # fmt: skip
        try:
            said, _ = run.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            run.terminate()  # then a launcher ends its workers; killed, it would leave them
            said, _ = run.communicate()
    assert run.returncode == 0, said[-3000:]
    return said


def test_two_nodes_train_as_one_process_does(recipe, alone, same_training, tmp_path):
    shell = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", TWO_NODES]
    start(shell, tmp_path, recipe, GLOO_SOCKET_IFNAME="cable")
    same_training(alone, tmp_path / "out", steps=5)


def test_workers_that_torchrun_starts_again_go_on_with_the_run_they_began(recipe, alone, same_training, tmp_path):
    (tmp_path / "mortal.py").write_text(MORTAL)
    torchrun = [*TORCHRUN.split(), "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    said = start([*torchrun, "mortal.py", "recipe.yaml"], tmp_path, recipe)
    assert "resumed     after step 2, from" in said
    (folder,) = (tmp_path / "runs").iterdir()
    same_training(alone, folder, steps=5)


def test_accelerate_launch_trains_as_one_process_does(recipe, alone, same_training, tmp_path):
    """--multi_gpu makes it start torchrun, also where there is no GPU."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    more = ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1"]
    start([*accelerate, *more, "--no_python", *TRAIN.split(), "--output", "out"], tmp_path, recipe)
    same_training(alone, tmp_path / "out", steps=5)


def test_the_slurm_script_starts_what_it_should(recipe, alone, same_training, tmp_path):
    """On a cluster of one node: srun runs a command there, scontrol knows its name."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, does in {"srun": 'exec "$@"', "scontrol": "echo localhost", "torchrun": f'exec {TORCHRUN} "$@"'}.items():
        (commands / name).write_text(f"#!/bin/sh\n{does}\n")
        (commands / name).chmod(0o755)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"JOB_NODELIST": "localhost", "NNODES": "1", "GPUS_ON_NODE": "2", "JOB_ID": "7"}
    variables = {f"SLURM_{name}": value for name, value in slurm.items()}
    script = Path(__file__).parents[2] / "docs" / "train.sbatch"
    start(["bash", str(script), "recipe.yaml", "out"], tmp_path, recipe, PATH=path, **variables)
    same_training(alone, tmp_path / "out", steps=5)
