# shellcheck shell=bash
# Common part of the batch scripts, which source it from the checkout with their own arguments.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

python=.venv/bin/python
dry_run=false
if [[ ${1:-} == --dry-run ]]; then
    dry_run=true
    shift
fi
(($#)) || fail "which config? sbatch configs/cluster/train.sbatch configs/train/NAME.yaml [ARGUMENT ...]"
[[ -f $1 ]] || fail "no config at $1: a path from the checkout, such as configs/train/eit_qwen3_8b.yaml"
[[ -x $python ]] || fail "no $python in $PWD: run make setup there first"

# start SCRIPT COMMAND CONFIG [ARGUMENT ...]: one process per task of the job; a dry run prints the command instead.
start() {
    local command=(
        # If one rank fails, the others would wait for it until the time limit.
        srun --kill-on-bad-exit=1 "$python" "$1" "$2" --config "$3"
        --trainer.devices="${SLURM_NTASKS_PER_NODE:-auto}" --trainer.num_nodes="${SLURM_NNODES:-1}" "${@:4}"
    )
    if $dry_run; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    [[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a job: submit with sbatch, or see the command with bash SCRIPT --dry-run"
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # since Slurm 22.05 srun does not take the job's
    "${command[@]}"
}
