#!/usr/bin/env bash
# One training on one node, one process per GPU. Sent again with the same folder it goes on from its last checkpoint.
# Usage: sbatch docs/cluster/single_node.sh OUT [FLAGS OF regrad train]
#SBATCH --job-name=regrad
#SBATCH --nodes=1
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

srun torchrun --standalone --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    -m regrad_runner train --processes "$SLURM_GPUS_ON_NODE" --out "$out" "$@"
