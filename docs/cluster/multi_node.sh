#!/usr/bin/env bash
# One training on several nodes, one process per GPU. OUT must be on a file system that all nodes see.
# Usage: sbatch docs/cluster/multi_node.sh OUT [FLAGS OF regrad train]
#SBATCH --job-name=regrad
#SBATCH --nodes=2
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
# The processes that a launcher restarts meet anew, where nothing is left of those before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 10000))

# One launcher per node; the first node's is where the others meet.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:$port" \
    -m regrad_runner train --resume auto --processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" --out "$out" "$@" &
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
