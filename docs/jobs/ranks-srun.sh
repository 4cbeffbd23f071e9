#!/bin/bash
# Several processes that share one conversion, on one node or many, where the filesystem is faster than one process.
#SBATCH --job-name=to-megatron
#SBATCH --nodes=4 --ntasks-per-node=4 --cpus-per-task=1 --mem-per-cpu=2G
#SBATCH --time=00:30:00 --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

# Absolute paths, on a filesystem that all nodes share.
converter=${CONVERTER:-/shared/weights-conversion}
model=${MODEL:-llama2}
source=${SOURCE:-/shared/models/Llama-2-70b-hf}
out=${OUT:-/shared/checkpoints/llama2-70b}

# Each task is a rank. One that fails ends the others, and --kill-on-bad-exit the step.
srun --cpus-per-task=1 --kill-on-bad-exit=1 "$converter/.venv/bin/python" "$converter/hf_to_megatron.py" "$model" \
    --model-path "$source" --out "$out" --workers 1 \
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4
