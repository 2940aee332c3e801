#!/usr/bin/env bash
# A comparison as job arrays without submitit, every run a job on one GPU: first the trials of learning rates, where
# there is a choice, then round by round those of rates that arms may add (jobs that no arm needs return at once), then
# the runs, then the report. Run it on the login node: it sends the jobs and returns. Run again with the same folder, it
# sends only the cells that have not ended. A job that fails holds up nothing but its own arm.
# Usage: docs/cluster/job_array.sh OUT [FLAGS OF regrad compare]
set -euo pipefail
out=${1:?give the folder to write}
shift
at_once=8 # jobs of an array that run at the same time
asks=(--gpus-per-node=1 --cpus-per-task=8 --time=04:00:00)

if [[ -f $out/config.yaml ]]; then
    set -- --resume "$@"
fi
cells=$(regrad compare --cells --out "$out" "$@")
mkdir -p "$out/jobs"
where=$(printf %q "$out")

after=()
while read -r what numbers; do
    if [[ $what == out ]]; then
        continue
    fi
    # `afterany`: a cell whose trials are missing is refused by itself, and all others run.
    job=$(sbatch --parsable --job-name="regrad-$what" "${asks[@]}" --array="$numbers%$at_once" "${after[@]}" \
        --requeue --open-mode=append --output="$out/jobs/$what-%A_%a.log" \
        --wrap="regrad compare --out $where --cell \$SLURM_ARRAY_TASK_ID" </dev/null)
    after=("--dependency=afterany:${job%%;*}")
done <<<"$cells"
sbatch --job-name=regrad-report --time=00:30:00 "${after[@]}" --output="$out/jobs/report-%j.log" \
    --wrap="regrad report $where && regrad sync $where"
