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
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
out=${1:?give the folder to write}
shift

# Two minutes before the job must end, SLURM tells this shell (USR1), which asks the launchers to end (TERM). Their
# processes save a checkpoint after the step under way. A minute and a half is how long the launchers wait for that.
warned=
trap 'warned=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90

# Modules of more than a million parameters become units that are gathered together.
srun accelerate launch --num_machines 1 --num_processes "$SLURM_GPUS_ON_NODE" --max_restarts 3 \
    --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy SIZE_BASED_WRAP --fsdp_min_num_params 1000000 \
    --fsdp_cpu_ram_efficient_loading false --mixed_precision no --dynamo_backend no \
    -m regrad_runner train --resume auto --processes "$SLURM_GPUS_ON_NODE" --out "$out" "$@" &
launcher=$!
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # the signal has ended the wait, and not the launchers
    status=0
    wait "$launcher" || status=$?
done
if [[ -n $warned && $status != 0 ]]; then # the job begins again, with the command that continues
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
