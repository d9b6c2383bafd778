"""Ways to start several processes: the Slurm script on two machines, torchrun that starts workers again, accelerate."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mtp_ce.training.config.recipe import to_yaml
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.run import pipeline

TORCHRUN = f"{sys.executable} -m torch.distributed.run"
TRAIN = f"{Path(sys.executable).parent / 'train-mtp'} recipe.yaml"

# Two machines as network namespaces, each with an address of its own, joined by a cable.
TWO_NODES = """
set -e
mount -t tmpfs tmpfs /run
for node in left right; do ip netns add $node; ip -n $node link set lo up; done
ip link add cable netns left type veth peer name cable netns right
ip -n left address add 10.9.0.1/24 dev cable
ip -n right address add 10.9.0.2/24 dev cable
for node in left right; do ip -n $node link set cable up; done
exec bash "$0" recipe.yaml out
"""
# What a cluster's machines have: a way to run a command on each, the first one's name, and names that resolve.
CLUSTER = {
    "srun": """set -e
LOCAL="--local-addr 10.9.0.2 --rdzv-conf is_host=0" ip netns exec right "$@" &
LOCAL="--local-addr 10.9.0.1 --rdzv-conf is_host=1" ip netns exec left "$@"
wait $!""",
    "scontrol": "echo 10.9.0.1",
    "torchrun": f'exec {TORCHRUN} $LOCAL "$@"',
}

# The second rank fails in its fourth step, once. The end of the group never comes then, as NCCL's where the other rank
# still waits for this one.
MORTAL = """
import os, sys, time
import torch.distributed
from mtp_ce.training.run import fitting
from mtp_ce.training.cli.train import main

class Mortal(fitting.Trainer):
    def _step(self, step, window):
        if step == 4 and os.environ["RANK"] == "1":
            raise RuntimeError("out of memory")
        super()._step(step, window)

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    fitting.Trainer = Mortal
    torch.distributed.destroy_process_group = lambda: time.sleep(100000)
sys.exit(main())
"""

# The end of the MLflow run takes longer than torchrun does to find that a rank is gone.
SLOW = """
import sys, time
from mtp_ce.training.tracking import mlflow as tracking
from mtp_ce.training.cli.train import main

class Slow(tracking.MlflowConnection):
    def close(self):
        time.sleep(1)
        super().close()

tracking.MlflowConnection = Slow
sys.exit(main())
"""


@pytest.fixture(scope="module")
def recipe(small) -> Recipe:
    options = ["train.steps=5", "train.log_every=1", "validation.every=2", "data.sequence_length=48", "name=launched"]
    return small([*options, "validation.rows=13", "validation.decoding.prompts=0", "checkpoint.every=2"])


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    pipeline.train(recipe, folder, Console(quiet=True))
    return folder


def start(command: list[str], where: Path, recipe: Recipe, code: int = 0, **environment: str) -> str:
    """Run a command to its end, which has this exit code; give what it said."""
    (where / "recipe.yaml").write_text(to_yaml(recipe))
    with subprocess.Popen(
        command, cwd=where, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as run:  # fmt: skip
        try:
            said, _ = run.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            run.terminate()  # then a launcher ends its workers; killed, it would leave them
            said, _ = run.communicate()
    assert run.returncode == code, said[-3000:]
    return said


def test_the_slurm_script_trains_on_two_nodes_as_one_process_does(recipe, alone, same_training, tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, does in CLUSTER.items():
        (commands / name).write_text(f"#!/bin/sh\n{does}\n")
        (commands / name).chmod(0o755)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"JOB_NODELIST": "nodes", "NNODES": "2", "GPUS_ON_NODE": "1", "JOB_ID": "7"}
    variables = {f"SLURM_{name}": value for name, value in slurm.items()}
    script = Path(__file__).parents[3] / "docs" / "train.sbatch"
    shell = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", TWO_NODES, str(script)]
    start(shell, tmp_path, recipe, PATH=path, GLOO_SOCKET_IFNAME="cable", **variables)
    same_training(alone, tmp_path / "out", steps=5)


def test_workers_that_torchrun_starts_again_go_on_with_the_run_they_began(recipe, alone, same_training, tmp_path):
    (tmp_path / "mortal.py").write_text(MORTAL)
    torchrun = [*TORCHRUN.split(), "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    said = start([*torchrun, "mortal.py", "recipe.yaml"], tmp_path, recipe)
    assert f"rank 1 on {socket.gethostname()} crashed:\nTraceback" in said
    assert "RuntimeError: out of memory" in said
    assert "terminated" not in said, "torchrun's SIGTERM finds a rank that is ending already"
    assert "resumed     after step 2, from" in said
    (folder,) = (tmp_path / "runs").iterdir()
    same_training(alone, folder, steps=5)


@pytest.mark.slow  # tests/training/run/test_ranks.py refuses a step on two ranks without a tracker
def test_ranks_that_refuse_a_step_leave_when_the_first_has_said_so_everywhere(small, finished_run, tmp_path):
    options = ["optimizer.lr=1e30", "tracking.kind=mlflow", f"tracking.uri={finished_run.database}"]
    (tmp_path / "slow.py").write_text(SLOW)
    torchrun = [*TORCHRUN.split(), "--standalone", "--nproc-per-node", "2"]
    recipe = small([*options, "tracking.experiment=refused by ranks"])
    said = start([*torchrun, "slow.py", "recipe.yaml", "--output", "out"], tmp_path, recipe, code=1)
    assert said.count("expected a finite number; the step was not taken") == 1, "one rank speaks for all"
    assert said.count("train-mtp: ") == 1
    assert said.count("exitcode  : 3 ") == 2, "torchrun reports the codes of both; its own is 1"

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=finished_run.database)
    runs = client.search_runs([client.get_experiment_by_name("refused by ranks").experiment_id])
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"], "the run and its stage"
    assert all(run.data.tags["stop.value"] in ("nan", "inf") for run in runs)


@pytest.mark.slow  # torchrun, which it starts, is what the other tests start
def test_accelerate_launch_trains_as_one_process_does(recipe, alone, same_training, tmp_path):
    """--multi_gpu makes it start torchrun, also where there is no GPU."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    more = ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1"]
    start([*accelerate, *more, "--no_python", *TRAIN.split(), "--output", "out"], tmp_path, recipe)
    same_training(alone, tmp_path / "out", steps=5)
