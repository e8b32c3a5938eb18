# shellcheck shell=bash
# Functions that all job scripts of this folder share. The scripts source this file in the batch shell, which runs on
# the job's first node.
#
# A person changes settings by flags of sbatch, by arguments after the script, and by two variables of the submitting
# shell, MAX_REQUEUES and SNAPSHOT. A site changes them in slurm/site.sh, which is sourced here if it exists
# (docs/cluster.md): modules to load, interfaces for NCCL, srun_flags=(...) for srun, and container=(...), which is put
# before torchrun and python.
set -uo pipefail

refuse() {
  echo "slurm: $*" >&2
  exit 2
}

log() { echo "[job $job.$SLURM_RESTART_COUNT $(date +%FT%T.%3N)] $*"; }

# clear_leftovers: unset the variables of another job or torchrun
#
# sbatch passes on the whole environment of the shell that calls it, and that shell may be part of another job or of a
# torchrun. Slurm replaces only the variables that it sets for this job.
clear_leftovers() {
  local name
  for name in $(compgen -e); do
    case $name in
      SLURM_CONF | SLURM_JWT | SLURM_WORKING_CLUSTER | SLURM_TMPDIR) ;; # how to reach Slurm, and a site's own
      SLURM_JOB_ID | SLURM_JOB_NODELIST | SLURM_JOB_ACCOUNT | SLURM_JOB_PARTITION | SLURM_SUBMIT_DIR) ;;
      SLURM_CPUS_PER_TASK | SLURM_NTASKS_PER_NODE | SLURM_ARRAY_*) ;; # this job's, since every header asks for them
      SLURM_GPUS_ON_NODE) ;; # this job's, if it has GPUs at all
      SLURM_* | SLURMD_* | SRUN_* | SBATCH_* | SALLOC_*) unset "$name" ;;
      RANK | LOCAL_RANK | GROUP_RANK | ROLE_RANK | WORLD_SIZE | LOCAL_WORLD_SIZE | GROUP_WORLD_SIZE | ROLE_WORLD_SIZE) unset "$name" ;;
      MASTER_ADDR | MASTER_PORT | ROLE_NAME | TORCHELASTIC_* | PET_*) unset "$name" ;;
    esac
  done
}

# prepare: go to the folder of the submission and set up the environment; every job begins with this
prepare() {
  local tries=0
  [ -n "${SLURM_JOB_ID:-}" ] ||
    refuse "this is no Slurm job: give the script to sbatch, or use torchrun --nproc_per_node=N train/main.py on one machine"
  [[ ${MAX_REQUEUES:-50} =~ ^[0-9]{1,9}$ ]] || refuse "MAX_REQUEUES='$MAX_REQUEUES': give a whole number"
  cd "$SLURM_SUBMIT_DIR" || refuse "$SLURM_SUBMIT_DIR is not there on $(hostname): submit from a folder that the nodes share"
  clear_leftovers
  # scontrol tells the restart count and the array. Slurm sets their variables only in restarted jobs and in arrays, so
  # the variables may be another job's.
  # A job's arguments may hold line ends, so its record may be several lines; of an array all records are shown.
  until record=$(scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null |
    awk -v own="JobId=$SLURM_JOB_ID " '/^JobId=/ { is_own = index($0, own) == 1 } is_own') && [ -n "$record" ]; do
    [ "$((tries += 1))" -le 24 ] || refuse "scontrol on $(hostname) has not known job $SLURM_JOB_ID for two minutes"
    sleep 5 # the controller may be restarting
  done
  SLURM_RESTART_COUNT=$(sed -n "1s/.* Restarts=\([0-9]*\) .*/\1/p" <<<"$record")
  export SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}
  case ${record%%$'\n'*} in
    *" ArrayTaskId="*) job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID ;; # the bare number may mean all tasks
    *) unset "${!SLURM_ARRAY_@}" && job=$SLURM_JOB_ID ;;
  esac
  export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  srun_flags=() container=()
  set +u # modules and conda read variables that may be unset
  # shellcheck source=/dev/null
  [ ! -r slurm/site.sh ] || . slurm/site.sh
  set -u
  [ ! -d .venv/bin ] || PATH=$PWD/.venv/bin:$PATH
}

# run_dir_of PRESET FLAGS...: print the run directory that train/main.py will use, so that no command takes it for a flag
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
  case $run_dir in -*) run_dir=./$run_dir ;; esac
  printf '%s\n' "$run_dir"
}

# unharmed COMMAND...: run a command to its end, whatever signals come
#
# Where Slurm follows processes by their group, the commands of the batch shell get its signals, too.
unharmed() {
  (
    trap '' USR1 TERM
    exec "$@"
  )
}

# requeue WHEN ...: ask launch/requeue.py
requeue() { unharmed python3 "$code/launch/requeue.py" "$@" --max-requeues="${MAX_REQUEUES:-50}"; }

# on_stop SIGNAL: ask the run to save and stop
#
# The signal is SIGTERM, or SIGUSR1 from --signal=B:USR1@300 near the time limit or at preemption. Under
# proctrack/cgroup no signal reaches the trainer behind a torchrun, so the trainer is asked by the STOP file. The job's
# tasks are signalled 20 s later, in case the file system is slow to show the file; torchrun passes the signal on and
# waits (--signals-to-handle, --shutdown-timeout). A STOP file that is there before the first signal is a person's: the
# run ends as the person asked.
#
# After SIGTERM this shell may be killed before the run has saved. So if Slurm cancels the job for another one, the job
# is requeued first; it starts again when the last of its processes has ended.
on_stop() {
  if [ -z "$asked" ] && [ -e "$run_dir/STOP" ]; then
    return 0
  fi
  if [ "$1" = TERM ] && [ -z "$decided" ]; then
    ! requeue preempted "$run_dir" --before="$before" --asked="$asked" || decided=yes
    if [ -n "$decided" ] && [ -n "$backup" ]; then
      kill "$backup" 2>/dev/null # the next start must not get its signal
    fi
  fi
  [ -z "$asked" ] || return 0
  asked=$1
  log "SIG$1: asking the run to save and stop"
  : >"$run_dir/STOP"
  [ -z "$decided" ] || return 0
  {
    sleep 20
    scancel --signal=USR1 "$job"
  } 2>/dev/null &
  backup=$!
}

# listen: remember a signal that comes before there is a run to stop
listen() {
  asked='' backup='' decided=''
  trap 'asked=USR1' USR1
  trap 'asked=TERM' TERM
}

# gpus_per_node: print the number of GPUs on each node of the job
#
# People ask for them by --gres=gpu:8 or gpu:h100:8, --gpus-per-node, --gpus or --gpus-per-task, and the record of the
# job (`scontrol show job`) has what they asked for. It comes first where it tells the number: in a job that is
# --exclusive SLURM_GPUS_ON_NODE is all GPUs of the node.
gpus_per_node() {
  local fields request requests asked='' total
  fields=$(grep -aoE ' Tres(Per[A-Z][a-z]+)=[^ ]*gpu[^ ]*' <<<"$record")
  IFS=, read -ra requests <<<"$(sed -n 's/^ TresPerNode=//p' <<<"$fields" | tail -n 1)"
  for request in ${requests[@]+"${requests[@]}"}; do
    [[ $request =~ ^(gres[:/])?gpu([:/=].*)?$ ]] || continue
    request=${request##*[:=]}
    [[ $request =~ ^[0-9]+$ ]] || request=1 # --gres=gpu
    [ "${asked:-$request}" = "$request" ] ||
      refuse "the job asks for $asked and for $request GPUs of each node: give sbatch --gres=gpu:N, which replaces the script's own, or --gres=none before --gpus-per-node, --gpus or --gpus-per-task"
    asked=$request
  done
  [ -z "$fields" ] || asked=${asked:-${SLURM_GPUS_ON_NODE:-}}
  [ "${asked:-0}" -gt 0 ] || refuse "the job has no GPUs: ask for them by sbatch --gres=gpu:N, or by --gres=none --gpus-per-node=N"
  total=$(sed -n 's/^ TresPerJob=.*gpu[^ ,]*[:=]\([0-9]*\)$/\1/p' <<<"$fields")
  [ -z "$total" ] || [ "$total" = "$((asked * ${#hosts[@]}))" ] ||
    refuse "Slurm gives unlike numbers of the $total GPUs to the ${#hosts[@]} nodes, $asked to $(hostname): ask by sbatch --gres=gpu:N in place of --gpus"
  echo "$asked"
}

# begin RUN_DIR: take the run for this job, and set hosts, gpus, address and port
begin() {
  run_dir=$1
  before=$(requeue begin "$run_dir") || exit
  trap 'on_stop USR1' USR1
  trap 'on_stop TERM' TERM
  if [ -n "$asked" ]; then
    finish 1
  fi
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  gpus=$(gpus_per_node) || exit
  # All ranks meet at the first host, on the network whose interface the site names, and at a port that nobody can tell
  # beforehand. The port lies below the kernel's own range, which begins at 32768; one that is in use is passed over.
  local interface=${GLOO_SOCKET_IFNAME:-}
  address=${hosts[0]}
  if [ -n "$interface" ]; then
    interface=${interface%%,*}
    address=$(ip -oneline -family inet address show dev "$interface" | sed -n '1s/.* inet \([0-9.]*\).*/\1/p')
    [ -n "$address" ] || refuse "GLOO_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME: $interface has no address on $(hostname)"
  fi
  port=$((12000 + $(od -An -N2 -tu2 /dev/urandom) % 18000))
  while (: <"/dev/tcp/$address/$port") 2>/dev/null; do port=$((port + 1)); done
}

# tasks N COMMAND...: run the command N times on each node of the allocation, then requeue the job or end it
tasks() {
  local per_node=$1 srun_pid
  shift
  log "${#hosts[@]} x $gpus processes on ${hosts[*]}; rendezvous at $address:$port; $run_dir is at step ${before#* }"
  # srun inherits neither the cores (since Slurm 22.05) nor, from a job with --gpus-per-task, all GPUs of a node.
  export SRUN_CPUS_PER_TASK=$((${SLURM_CPUS_PER_TASK:-1} * ${SLURM_NTASKS_PER_NODE:-1} / per_node))
  [ "$SRUN_CPUS_PER_TASK" -gt 0 ] || refuse "$gpus processes on each node, and fewer cores: give sbatch --cpus-per-task"
  # Every node checks by itself whether it sees the folders.
  # shellcheck disable=SC2016  # the inner shell expands the variables
  srun --nodes="${#hosts[@]}" --ntasks="$((per_node * ${#hosts[@]}))" --ntasks-per-node="$per_node" --gres="gpu:$gpus" \
    --export=ALL --kill-on-bad-exit=1 --label ${srun_flags[@]+"${srun_flags[@]}"} \
    bash -c 'for folder in "$1" "$0"; do
      cd "$folder" 2>/dev/null && [ -r train/main.py ] && continue
      echo "slurm: $folder/train/main.py is not there on $(hostname): submit from a folder that all nodes share" >&2
      sleep 2 # srun needs time to pass the message on before it ends
      exit 2
    done
    PET_NODE_RANK=$SLURM_NODEID exec "${@:2}"' "$PWD" "$code" ${container[@]+"${container[@]}"} "$@" &
  srun_pid=$!
  while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid"; done # a signal also ends a wait
  wait "$srun_pid"
  finish "$?"
}

# train PRESET FLAGS...: train one run
train() {
  listen
  prepare
  train_run "$@"
}

# sweep PRESET --grid ... -- FLAGS...: train the run of this task of the array
sweep() {
  local words run
  listen
  prepare
  [ "$#" -gt 0 ] || refuse "which runs? slurm/sweep.sh PRESET --grid FLAG=VALUE,VALUE ... -- FLAGS"
  words=$(unharmed python3 launch/grid.py "${@:1:1}" --point "${SLURM_ARRAY_TASK_ID:-0}" "${@:2}") || exit
  eval "run=($words)" # they are quoted
  train_run "${run[@]}"
}

# train_run PRESET FLAGS...: train with this job's own copy of the code (launch/snapshot.py)
train_run() {
  run_dir=$(run_dir_of "$@")
  code=$PWD
  if [ "$SLURM_RESTART_COUNT" -gt 0 ] && [ -e "$run_dir/code/job_$job" ]; then
    code=$(unharmed python3 "$run_dir/code/job_$job/launch/snapshot.py" check "$run_dir/code/job_$job") || exit
    # shellcheck source=slurm/body.sh
    . "$code/slurm/body.sh" # so that edits of the checkout do not change this job
  fi
  train_with_code "$@"
}

# train_with_code PRESET FLAGS...: run one torchrun on each node
train_with_code() {
  begin "$run_dir"
  if [ "$code" = "$PWD" ] && [ "${SNAPSHOT:-on}" = on ]; then
    code=$(unharmed python3 launch/snapshot.py take "$run_dir" --job "$job") || exit
  fi
  # --max-restarts=0: Slurm restarts the job, and torchrun restarts nothing. So nobody joins later, and the rendezvous
  # can be the static one: in that of c10d, torchrun unpickles what anybody puts into its store. torchrun also reads its
  # flags from PET_*; the id is not for everybody who can list processes, and `tasks` sets the node's rank.
  PET_RDZV_ID=$SLURM_JOB_ID.$SLURM_RESTART_COUNT.$(cat /proc/sys/kernel/random/uuid)
  export PET_RDZV_ID TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120
  tasks 1 torchrun \
    --nnodes="${#hosts[@]}" --nproc-per-node="$gpus" --max-restarts=0 \
    --rdzv-backend=static --master-addr="$address" --master-port="$port" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    "$code/train/main.py" "$@"
}

# submitted CODE RUN_DIR...: begin a job of launch/submit.py, which runs in CODE
#
# Each task of an array has its own run directory. The job script goes on with `per_rank PYTHON ...`.
submitted() {
  listen
  prepare
  code=$(unharmed python3 "$1/launch/snapshot.py" check "$1") || exit
  shift "$((1 + ${SLURM_ARRAY_TASK_ID:-0}))"
  begin "$1"
}

# per_rank COMMAND...: run the command once for each GPU of the allocation
per_rank() {
  export MASTER_ADDR=$address MASTER_PORT=$port
  tasks "$gpus" "$@"
}

# finish STATUS: requeue the job or end it; STATUS is the exit status of srun
#
# status.json tells how the run ended. The exit status does not: it is 1 for a run that saved and stopped, too.
finish() {
  [ -z "$backup" ] || kill "$backup" 2>/dev/null
  [ -z "$decided" ] || exit "$1"
  trap '' USR1 TERM # the decision takes them into account
  requeue end "$run_dir" --before="$before" --asked="$asked" --exit-status="$1"
  exit
}
