#!/bin/bash
# One process: enough for most disks. Edit the four values, then: sbatch one-process.sh. It needs no GPU.
#SBATCH --job-name=to-megatron
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=4 --mem=4G
#SBATCH --time=02:00:00 --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

# Absolute paths: SLURM runs a copy of this file from a folder of its own.
converter=${CONVERTER:-/shared/weights-conversion}
model=${MODEL:-llama2}
source=${SOURCE:-/shared/models/Llama-2-70b-hf}
out=${OUT:-/shared/checkpoints/llama2-70b}

# srun does not take over --cpus-per-task of the job by itself. --signal reaches what srun has started: the conversion says
# that it was stopped, and the same job continues it. Submitted once more after its end, it says "already complete".
srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$converter/.venv/bin/python" "$converter/hf_to_megatron.py" "$model" \
    --model-path "$source" --out "$out" --workers "$SLURM_CPUS_PER_TASK" \
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4
