#!/bin/bash
# As ranks-srun.sh, with one torchrun on each node; here an export.
#SBATCH --job-name=to-hf
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=4 --mem=8G
#SBATCH --time=00:30:00 --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

# Absolute paths, on a filesystem that all nodes share.
converter=${CONVERTER:-/shared/weights-conversion}
checkpoint=${CHECKPOINT:-/shared/runs/llama2-70b}
out=${OUT:-/shared/models/llama2-70b-trained}

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((10000 + SLURM_JOB_ID % 20000))
export converter checkpoint out first port
# The node's own number is known on the node only, so a shell there starts torchrun.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c '
    exec "$converter/.venv/bin/torchrun" --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_CPUS_PER_TASK" \
        --node-rank "$SLURM_NODEID" --master-addr "$first" --master-port "$port" \
        "$converter/megatron_to_hf.py" --input_dir "$checkpoint" --output_dir "$out" --num_output_shards 15 --workers 1'
