#!/bin/bash
# All GPUs of one machine. It may be sent again, or requeued: it goes on where it was.
#   sbatch examples/slurm/one_machine.sh MODEL TASK OUTPUT [more options of hf-lowrank compress]
#SBATCH --job-name=hf-lowrank
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=hf-lowrank-%j.log
set -euo pipefail

model=$1 task=$2 output=$3
shift 3
processes=${SLURM_GPUS_ON_NODE:-1}
# The time limit sends SIGTERM to srun's tasks two minutes ahead; the launcher passes it on, and the job keeps what it has.
srun --kill-on-bad-exit=1 accelerate launch \
    --config_file "${HF_LOWRANK_EXAMPLES:-examples}/accelerate/${HF_LOWRANK_CONFIG:-several_gpus.yaml}" \
    --num_processes "$processes" \
    -m hf_lowrank compress "$model" --task "$task" --output "$output" --resume "$@"
