#!/bin/bash
# The CPUs of one machine, two processes.
#   sbatch examples/slurm/cpu.sh MODEL TASK OUTPUT [more options of hf-lowrank compress]
#SBATCH --job-name=hf-lowrank
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=hf-lowrank-%j.log
set -euo pipefail

model=$1 task=$2 output=$3
shift 3
processes=2
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-2} / processes))
srun --kill-on-bad-exit=1 accelerate launch \
    --config_file "${HF_LOWRANK_EXAMPLES:-examples}/accelerate/cpu.yaml" --num_processes "$processes" \
    -m hf_lowrank compress "$model" --task "$task" --output "$output" --resume "$@"
