#!/usr/bin/env bash
# One training on several nodes, one process per GPU. OUT must be on a file system that all nodes see.
# Usage: sbatch docs/cluster/multi_node.sh OUT [FLAGS OF regrad train]
#SBATCH --job-name=regrad
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@60
set -euo pipefail
out=${1:?give the folder to write}
shift
if [[ -f $out/config.yaml ]]; then
    set -- --resume "$@"
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 10000))

# One launcher per node; the first node's is where the others meet.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:$port" \
    -m regrad_runner train --processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" --out "$out" "$@"
