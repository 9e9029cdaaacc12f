#!/bin/bash
# All GPUs of several machines. OUTPUT must be on storage that all of them share. It may be sent again, or requeued.
#   sbatch --nodes=2 examples/slurm/several_machines.sh MODEL TASK OUTPUT [more options of hf-lowrank compress]
#SBATCH --job-name=hf-lowrank
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=hf-lowrank-%j.log
set -euo pipefail

export model=$1 task=$2 output=$3
shift 3
export processes=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1}))
export first_machine
first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One launcher for each machine; the one that ends badly ends them all.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
    --config_file "${HF_LOWRANK_EXAMPLES:-examples}/accelerate/several_machines.yaml" \
    --num_machines "$SLURM_NNODES" --num_processes "$processes" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$first_machine" \
    -m hf_lowrank compress "$model" --task "$task" --output "$output" --resume "$@"' launcher "$@"
