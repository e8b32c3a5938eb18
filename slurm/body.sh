# shellcheck shell=bash
# What the jobs of this folder have in common. Their headers source it, in the batch shell, on the job's first node.
#
# Everything a site or a person may want to change is a flag of sbatch, an argument after the script, a variable of the
# submitting shell (MAX_REQUEUES, SNAPSHOT), or a line in slurm/site.sh, which is sourced here if it is there
# (docs/cluster.md): modules to load, interfaces for NCCL, srun_flags=(...) for srun, container=(...) to put before
# torchrun and python.
set -uo pipefail

refuse() {
  echo "slurm: $*" >&2
  exit 2
}

log() { echo "[job $job.$SLURM_RESTART_COUNT $(date +%FT%T.%3N)] $*"; }

# sbatch hands on the whole environment of the shell it is called in, which may be part of another job or of a torchrun;
# in this job's environment Slurm replaces only what it has to say itself.
clear_leftovers() {
  local name
  for name in $(compgen -e); do
    case $name in
      SLURM_CONF | SLURM_JWT | SLURM_WORKING_CLUSTER | SLURM_TMPDIR) ;; # how to reach Slurm; a site's own
      SLURM_JOB_ID | SLURM_JOB_NODELIST | SLURM_JOB_ACCOUNT | SLURM_JOB_PARTITION | SLURM_SUBMIT_DIR) ;;
      SLURM_GPUS_PER_NODE | SLURM_CPUS_PER_TASK | SLURM_ARRAY_*) ;; # ours: every header asks for them
      SLURM_* | SLURMD_* | SRUN_* | SBATCH_* | SALLOC_*) unset "$name" ;;
      RANK | LOCAL_RANK | GROUP_RANK | ROLE_RANK | WORLD_SIZE | LOCAL_WORLD_SIZE | GROUP_WORLD_SIZE | ROLE_WORLD_SIZE) unset "$name" ;;
      MASTER_ADDR | MASTER_PORT | ROLE_NAME | TORCHELASTIC_* | PET_*) unset "$name" ;;
    esac
  done
}

# prepare: first of all in every job. The folder it was submitted from, and the environment.
prepare() {
  local record tries=0
  [ -n "${SLURM_JOB_ID:-}" ] ||
    refuse "this is no Slurm job: give the script to sbatch, or use torchrun --nproc_per_node=N train/main.py on one machine"
  cd "$SLURM_SUBMIT_DIR" || refuse "$SLURM_SUBMIT_DIR is not there on $(hostname): submit from a folder that the nodes share"
  clear_leftovers
  # Asked for, since Slurm sets them in restarted jobs and in arrays only, and another job's may be there.
  until record=$(scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null | grep "^JobId=$SLURM_JOB_ID "); do
    [ "$((tries += 1))" -le 24 ] || refuse "scontrol on $(hostname) has not told of job $SLURM_JOB_ID for two minutes"
    sleep 5 # a controller that is just taken over
  done
  SLURM_RESTART_COUNT=$(sed -n "s/.* Restarts=\([0-9]*\) .*/\1/p" <<<"$record")
  export SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}
  case $record in
    *" ArrayTaskId="*) job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID ;; # to Slurm's commands, its bare number may be all tasks
    *) unset "${!SLURM_ARRAY_@}" && job=$SLURM_JOB_ID ;;
  esac
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since Slurm 22.05 srun does not take it from the job
  export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  srun_flags=() container=()
  set +u # modules and conda look at what may not be set
  # shellcheck source=/dev/null
  [ ! -r slurm/site.sh ] || . slurm/site.sh
  set -u
  [ ! -d .venv/bin ] || PATH=$PWD/.venv/bin:$PATH
}

# run_dir_of PRESET FLAGS...: where train/main.py will put the run
run_dir_of() {
  local run_dir=runs/$1
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --run[-_]dir=*) run_dir=${1#*=} ;;
      --run[-_]dir) run_dir=${2:-$run_dir} ;;
    esac
    shift
  done
  echo "$run_dir"
}

# The signal of --signal=B:USR1@300 near the time limit or at preemption, or SIGTERM. Under proctrack/cgroup no signal
# reaches the trainer behind a torchrun, so it is asked by the file that it looks for; the job's tasks are signalled
# later, in case the file system is slow to show the file. torchrun hands the signal on and waits
# (--signals-to-handle, --shutdown-timeout).
on_stop() {
  [ -z "$asked" ] || return 0
  asked=$1
  log "SIG$1: asking the run to save and stop"
  : >"$run_dir/STOP"
  {
    sleep 20
    scancel --signal=USR1 "$job"
  } 2>/dev/null &
  backup=$!
}

# listen: from the job's first moment, while there is no run yet to be asked
listen() {
  asked='' backup=''
  trap 'asked=USR1' USR1
  trap 'asked=TERM' TERM
}

# begin RUN_DIR: from now on it is this job's
begin() {
  run_dir=$1
  before=$(python3 "$code/launch/requeue.py" begin "$run_dir") || exit
  trap 'on_stop USR1' USR1
  trap 'on_stop TERM' TERM
  if [ -n "$asked" ]; then
    finish 1
  fi
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # Not SLURM_GPUS_ON_NODE, which is all that the node has in a job that is --exclusive. "h100:8" is 8, too.
  gpus=${SLURM_GPUS_PER_NODE:-}
  gpus=${gpus##*:}
  [ -n "$gpus" ] || refuse "no GPUs were asked for: sbatch --gpus-per-node N"
  # Below the kernel's own range (32768 and up); another one for each job and restart, and for whoever has it already.
  port=$((12000 + (SLURM_JOB_ID * 13 + SLURM_RESTART_COUNT) % 18000))
  while (: <"/dev/tcp/${hosts[0]}/$port") 2>/dev/null; do port=$((port + 1)); done
}

# tasks N COMMAND...: N times on each node of the allocation; then requeue the job, or leave it at that.
tasks() {
  local per_node=$1 srun_pid
  shift
  log "${#hosts[@]} x $gpus processes on ${hosts[*]}; rendezvous at ${hosts[0]}:$port; $run_dir is at step ${before#* }"
  # Each node looks for the folders itself.
  # shellcheck disable=SC2016  # the inner shell expands them
  srun --nodes="${#hosts[@]}" --ntasks="$((per_node * ${#hosts[@]}))" --ntasks-per-node="$per_node" --export=ALL \
    --kill-on-bad-exit=1 --label ${srun_flags[@]+"${srun_flags[@]}"} \
    bash -c 'for folder in "$1" "$0"; do
      cd "$folder" 2>/dev/null && [ -r train/main.py ] && continue
      echo "slurm: $folder/train/main.py is not there on $(hostname): submit from a folder that all nodes share" >&2
      sleep 2 # else srun may end before it has passed that on
      exit 2
    done
    exec "${@:2}"' "$PWD" "$code" ${container[@]+"${container[@]}"} "$@" &
  srun_pid=$!
  while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid"; done # a signal ends a wait, too
  wait "$srun_pid"
  finish "$?"
}

# train PRESET FLAGS...
train() {
  listen
  prepare
  train_run "$@"
}

# sweep PRESET --grid ... -- FLAGS...: the run of this task of the array
sweep() {
  local run
  listen
  prepare
  [ "$#" -gt 0 ] || refuse "which runs? slurm/sweep.sh PRESET --grid FLAG=VALUE,VALUE ... -- FLAGS"
  run=$(python3 launch/grid.py "${@:1:1}" --point "${SLURM_ARRAY_TASK_ID:-0}" "${@:2}") || exit
  mapfile -t run <<<"$run"
  train_run "${run[@]}"
}

# By one torchrun on each node, with this job's own copy of the code (launch/snapshot.py).
train_run() {
  run_dir=$(run_dir_of "$@")
  code=$PWD
  if [ "$SLURM_RESTART_COUNT" -gt 0 ] && [ -e "$run_dir/code/job_$job" ]; then
    code=$(python3 "$run_dir/code/job_$job/launch/snapshot.py" check "$run_dir/code/job_$job") || exit
    # shellcheck source=slurm/body.sh
    . "$code/slurm/body.sh" # whoever edits this file meanwhile does not change this job
  fi
  train_with_code "$@"
}

train_with_code() {
  begin "$run_dir"
  if [ "$code" = "$PWD" ] && [ "${SNAPSHOT:-on}" = on ]; then
    code=$(python3 launch/snapshot.py take "$run_dir" --job "$job") || exit
  fi
  # --max-restarts=0: Slurm restarts the job, torchrun nothing.
  tasks 1 torchrun \
    --nnodes="${#hosts[@]}" --nproc-per-node="$gpus" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="${hosts[0]}:$port" --rdzv-id="$SLURM_JOB_ID.$SLURM_RESTART_COUNT" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=120 \
    "$code/train/main.py" "$@"
}

# submitted CODE RUN_DIR...: by launch/submit.py, from CODE; each task of an array has its own run directory. What
# follows is `per_rank PYTHON ...`.
submitted() {
  listen
  prepare
  code=$(python3 "$1/launch/snapshot.py" check "$1") || exit
  shift "$((1 + ${SLURM_ARRAY_TASK_ID:-0}))"
  begin "$1"
}

per_rank() {
  export MASTER_ADDR=${hosts[0]} MASTER_PORT=$port
  tasks "$gpus" "$@"
}

# finish STATUS: of srun. status.json tells how the run ended, not the status; a run that saved and stopped has 1.
finish() {
  [ -z "$backup" ] || kill "$backup" 2>/dev/null
  python3 "$code/launch/requeue.py" end "$run_dir" --before "$before" --asked "$asked" --exit-status "$1" \
    --max-requeues "${MAX_REQUEUES:-50}"
  exit
}
