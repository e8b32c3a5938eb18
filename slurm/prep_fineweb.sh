#!/usr/bin/env bash
# Turn FineWeb-Edu into training shards: an array of tasks tokenizes, and a job after it packs and verifies.
#
#   sbatch --account A --partition P slurm/prep_fineweb.sh                                # sample-10BT, 8 tasks
#   sbatch --account A --array=0-31 slurm/prep_fineweb.sh --name sample-100BT --out data/fineweb_edu_100B
#
# Arguments after the script are data_prep/fineweb.py's. The first task submits the job that packs, with this job's
# account and partition. One task downloads while the others wait. Where nodes have no network, first run
# `python data_prep/fineweb.py --stage download` with the same arguments on the login node. After a stop or a failure
# the same command continues from the finished parts.
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
cd "${PREP_FOLDER:-$PWD}" || exit # the relative paths given to launch/submit.py start there

# fineweb STAGE FLAGS...: run one stage of the preparation
fineweb() {
  local stage=$1
  shift
  ${container[@]+"${container[@]}"} python "$code/data_prep/fineweb.py" --workers "$SLURM_CPUS_PER_TASK" "$@" --stage "$stage"
}

# submit_pack FLAGS...: submit the job that packs, once the array has succeeded
submit_pack() {
  local name=pack-fineweb-$SLURM_ARRAY_JOB_ID account=()
  [ -z "$(squeue --noheader --name "$name")" ] || return 0 # an earlier start of this task has submitted it
  [ -z "${SLURM_JOB_ACCOUNT:-}" ] || account=(--account="$SLURM_JOB_ACCOUNT")
  PREP_FINEWEB=pack sbatch --dependency="afterok:$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes --array=0 \
    --job-name="$name" --output="%x.log" --partition="$SLURM_JOB_PARTITION" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    ${account[@]+"${account[@]}"} slurm/prep_fineweb.sh "$@" || exit
}

# launch/submit.py --prep submits the two stages one by one, from a copy of the code, and names them in PREP_FINEWEB:
# tokenize or pack.
if [ "${PREP_FINEWEB:-}" = pack ]; then
  fineweb pack "$@" && fineweb verify "$@"
  exit
fi
[ -n "${PREP_FINEWEB:-}" ] || [ "$SLURM_ARRAY_TASK_ID" != "$SLURM_ARRAY_TASK_MIN" ] || submit_pack "$@"
fineweb download "$@" --task-index 0 --num-tasks 1 && fineweb tokenize "$@"
