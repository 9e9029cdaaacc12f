"""The launch recipes: accelerate's own loader reads them, and the SLURM scripts start what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.launches import QUIET, ROOT, make_data, make_model

CONFIGS = sorted((ROOT / "examples/accelerate").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "examples/slurm").glob("*.sh"))

# Stands in for srun and scontrol on a machine without SLURM: the tasks of one node are run as they are.
SRUN = '#!/bin/bash\necho "srun $*" >> "$CALLS"\nshift\nSLURM_NODEID=0 exec "$@"\n'
SCONTROL = "#!/bin/bash\necho 127.0.0.1\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_config(path: Path) -> None:
    config = load_config_from_file(str(path))
    processes = {"one_gpu": 1, "several_gpus": 4, "several_machines": 8, "cpu": 2}[path.stem]
    assert config.num_processes == processes
    assert config.num_machines == (2 if path.stem == "several_machines" else 1)
    words = ["--config_file", str(path), "-m", "hf_lowrank", "methods"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert bool(arguments.multi_gpu) == (processes > 1)  # it starts that many by itself
    assert arguments.use_cpu == (path.stem == "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_slurm_scripts_start_the_command(script: Path, tmp_path: Path) -> None:
    """As far as a machine without SLURM and GPUs can tell: two processes on its CPUs."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_GPUS_ON_NODE": "2", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_PER_TASK": "2"}
    slurm |= {"HF_LOWRANK_CONFIG": "cpu.yaml"}  # several_gpus.yaml insists on GPUs
    paths = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [make_model(tmp_path / "model"), "cola", tmp_path / "out", "--data-dir", make_data(tmp_path / "data")]
    method = "kfac" if script.stem == "cpu" else "svd"  # which measures nothing
    done = subprocess.run(
        ["bash", script, *map(str, words), "--method", method],
        env=os.environ | QUIET | slurm | {"PATH": paths, "CALLS": str(tmp_path / "calls"), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"layers factorized by {method}") == 1  # one job of two processes, not two jobs
    assert (tmp_path / "out/model.safetensors").is_file()
    assert "--kill-on-bad-exit=1" in (tmp_path / "calls").read_text()
