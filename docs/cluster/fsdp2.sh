#!/usr/bin/env bash
# One training on one node with weights, gradients and optimizer state sharded over its GPUs (FSDP2).
# Corrections that are not exact on shards are refused at the start.
# Usage: sbatch docs/cluster/fsdp2.sh OUT [FLAGS OF regrad train]
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

# Modules of more than a million parameters become units that are gathered together.
srun accelerate launch --num_machines 1 --num_processes "$SLURM_GPUS_ON_NODE" \
    --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy SIZE_BASED_WRAP --fsdp_min_num_params 1000000 \
    --fsdp_cpu_ram_efficient_loading false --mixed_precision no --dynamo_backend no \
    -m regrad_runner train --processes "$SLURM_GPUS_ON_NODE" --out "$out" "$@"
