#!/usr/bin/env bash
# A comparison as job arrays, every run a job on one GPU: first the trials of learning rates, where there is a choice,
# then round by round those of rates that arms may add (jobs that no arm needs return at once), then the runs, then the
# report. Run it on the login node: it sends the jobs and returns. Run again with the same folder it sends all of them
# once more, and those that ended return at once.
# Usage: docs/cluster/job_array.sh OUT [FLAGS OF regrad compare]
set -euo pipefail
out=${1:?give the folder to write}
shift
if [[ -f $out/config.yaml ]]; then
    set -- --resume "$@"
fi
cells=$(regrad compare --cells --out "$out" "$@")
where=$(printf %q "$out")

jobs=()
while read -r what numbers; do
    if [[ $what != out ]]; then
        after=("${jobs[@]/#/--dependency=afterok:}")
        jobs=("$(sbatch --parsable --job-name="regrad-$what" --gpus-per-node=1 --cpus-per-task=8 --time=04:00:00 \
            --array="$numbers" "${after[@]}" --wrap="regrad compare --out $where --cell \$SLURM_ARRAY_TASK_ID" </dev/null)")
    fi
done <<<"$cells"
sbatch --job-name=regrad-report --time=00:30:00 "${jobs[@]/#/--dependency=afterany:}" \
    --wrap="regrad report $where && regrad sync $where"
