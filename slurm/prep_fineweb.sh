#!/usr/bin/env bash
# FineWeb-Edu -> training shards: an array of tasks that tokenize, and a job after them that packs and verifies.
#
#   sbatch --account A --partition P slurm/prep_fineweb.sh                                # sample-10BT, 8 tasks
#   sbatch --account A --array=0-31 slurm/prep_fineweb.sh --name sample-100BT --out data/fineweb_edu_100B
#
# Arguments after the script are data_prep/fineweb.py's. The first task submits the job that packs, with this job's
# account and partition. Whichever task comes first downloads while the others wait; where nodes have no network, run
# `python data_prep/fineweb.py --stage download` with the same arguments on the login node first. Stopped or failed, the
# same command goes on from the parts that are there.
#SBATCH --job-name=prep-fineweb
#SBATCH --array=0-7
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue --open-mode=append --output=%x-%A_%a.log

body=${SLURM_SUBMIT_DIR:-.}/slurm/body.sh # this script runs from a copy elsewhere
[ -r "$body" ] || { echo "slurm: $body is not there: submit from the root of the checkout" >&2 && exit 2; }
# shellcheck source=slurm/body.sh
. "$body"
prepare
code=$PWD
cd "${PREP_FOLDER:-$PWD}" || exit # where relative paths start that launch/submit.py was given

# fineweb STAGE FLAGS...
fineweb() {
  local stage=$1
  shift
  ${container[@]+"${container[@]}"} python "$code/data_prep/fineweb.py" --workers "$SLURM_CPUS_PER_TASK" "$@" --stage "$stage"
}

submit_pack() {
  local name=pack-fineweb-$SLURM_ARRAY_JOB_ID of_ours=()
  [ -z "$(squeue --noheader --name "$name")" ] || return 0 # by an earlier start of this task
  [ -z "${SLURM_JOB_ACCOUNT:-}" ] || of_ours=(--account="$SLURM_JOB_ACCOUNT")
  PREP_FINEWEB=pack sbatch --dependency="afterok:$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes --array=0 \
    --job-name="$name" --output="%x.log" --partition="$SLURM_JOB_PARTITION" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    ${of_ours[@]+"${of_ours[@]}"} slurm/prep_fineweb.sh "$@" || exit
}

# PREP_FINEWEB, tokenize or pack: what launch/submit.py --prep submits one by one, from a copy of the code.
if [ "${PREP_FINEWEB:-}" = pack ]; then
  fineweb pack "$@" && fineweb verify "$@"
  exit
fi
[ -n "${PREP_FINEWEB:-}" ] || [ "$SLURM_ARRAY_TASK_ID" != "$SLURM_ARRAY_TASK_MIN" ] || submit_pack "$@"
fineweb download "$@" --task-index 0 --num-tasks 1 && fineweb tokenize "$@"
