"""The scripts under launch/ that start jobs on clusters; local.sh is run in tests/test_mps.py."""

import os
import random
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_shell_scripts_parse(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


def test_slurm_starts_two_ranks_per_gpu_that_meet_at_the_first_node(tmp_path):
    # The second writes more than a pipe holds.
    for name, text in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo first; seq 100000")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    gpus_per_node = random.randrange(1, 9)
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "+mode=colocate", "seed=7"],
        capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "123456",
             "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": str(gpus_per_node),
             "SLURM_SUBMIT_DIR": "/shared/clone", "SLURM_JOB_NODELIST": "n[1-2]"},
    )  # fmt: skip
    words = done.stdout.splitlines()
    assert "--nnodes=2" in words
    assert f"--nproc-per-node={2 * gpus_per_node}" in words
    assert "--rdzv-endpoint=first:23456" in words
    assert words[-3:] == ["+mode=colocate", "seed=7", "run_dir=/shared/clone/outputs/slurm-123456"]


def test_kubernetes_job_shares_what_ranks_need():
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((LAUNCH / "k8s.yaml").read_text())
    assert service["spec"]["clusterIP"] == "None"
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert "/dev/shm" in mounts.values()
    limits = container["resources"]["limits"]
    words = " ".join(container["command"])
    assert f"--nproc-per-node={2 * limits['nvidia.com/gpu']}" in words
    assert f"--nnodes={job['spec']['completions']}" in words
    assert "--max-restarts" not in words, "refused on several nodes"
