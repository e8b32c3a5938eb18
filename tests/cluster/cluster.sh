#!/usr/bin/env bash
# Run a real Slurm of several nodes on one machine, for tests. It starts in a second or two and leaves nothing behind.
#
#   cluster.sh check         print why no cluster can be started here; print nothing, exit status 0, if one can
#   cluster.sh up [N=2]      start munged, slurmctld and N nodes
#   cluster.sh down          end all jobs, nodes and daemons, and remove every trace
#   cluster.sh env           print lines to eval, after which sbatch, srun and squeue are this cluster's
#   cluster.sh status        show daemons, nodes and queue
#   cluster.sh exec I CMD    run CMD inside node I, with the node's network, hostname and processes
#   cluster.sh kill-node I   kill node I with every process on it
#   cluster.sh start-node I  boot node I again
#
# Needs root and: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2
#
# Every node has its own network namespace (an address on a private bridge, all ports to itself), hostname, process ids,
# /dev/shm and /etc/hosts, and fake GPUs (generic resources without a device behind them). The file system is the
# machine's. So rendezvous by hostname, clashes of ports, crashed nodes, preemption and requeueing are real. cgroups are
# named by node, not by cluster, so the node names cXXXXn1, cXXXXn2, ... depend on the cluster's folder: clusters in
# different folders do not interfere.
#
# Partitions: debug (default), and three that high preempts: low by requeueing, cancel by cancelling without a time of
# grace, and notice by cancelling five seconds after a signal.
#
# Environment, when `up` is called:
#   SLURM_CLUSTER_DIR=/tmp/slurm-cluster   configuration, keys, sockets, logs, pids
#   GPUS=8 CPUS=64       what each node claims to have
#   CRED_EXPIRE=5        seconds before a requeued job may start again (Slurm's default: 120)
#   KILL_WAIT=30         seconds from SIGTERM to SIGKILL at scancel and at the time limit (Slurm's default)
#   GRACE=30             seconds of notice for a preempted job
#   PROCTRACK=cgroup     how slurmd follows a job's processes, which decides who gets a signal. With cgroup, as on
#                        nearly every real cluster, only the task itself (torchrun) gets it, not its children. Where no
#                        cgroup can be written, `up` says so and uses pgid: the task's process group, which does not
#                        include torchrun's workers.
set -euo pipefail

DIR=${SLURM_CLUSTER_DIR:-/tmp/slurm-cluster}
GPUS=${GPUS:-8} CPUS=${CPUS:-64}
CRED_EXPIRE=${CRED_EXPIRE:-5} KILL_WAIT=${KILL_WAIT:-30} GRACE=${GRACE:-30}
SELF=$(readlink -f "${BASH_SOURCE[0]}")
HASH=$(printf %s "$DIR" | cksum | cut -d' ' -f1)
ID=$(printf %04x $((HASH % 65536)))
NODE=c${ID}n
BRIDGE=sl$ID
CONTROLLER=$(hostname -s)
FREEZER=/sys/fs/cgroup/freezer # cgroup v1, which slurmd can use without systemd
CONTROLLER_PORT=$((20000 + HASH % 12000)) NODE_PORT=6818
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$DIR/etc/slurm.conf

die() {
  echo "cluster.sh: $*" >&2
  exit 1
}

log() { echo "cluster.sh: $*" >&2; }

# start_time PID: print when the process started (field 22 of proc(5)'s stat), because a pid alone may be used again
start_time() { awk '{ sub(/.*\) /, ""); print $20 }' "/proc/$1/stat" 2>/dev/null || true; }

# in_background NAME CMD...: start CMD in a session of its own, so that nothing depends on the caller's terminal
in_background() {
  local name=$1
  shift
  setsid "$@" </dev/null >>"$DIR/log/$name.out" 2>&1 &
  echo "$! $(start_time $!) $name" >>"$DIR/pids"
}

# is_alive PID START: a zombie, which a container's first process may never collect, is not alive
is_alive() { [ "$(start_time "$1")" = "$2" ] && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; }

# wait_for SECONDS WHAT CMD...: wait until CMD succeeds
wait_for() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || die "waited too long for $what; logs are in $DIR/log"
    sleep 0.05
  done
}

why_not() {
  local missing=() name
  for name in munged slurmctld slurmd sbatch ip unshare nsenter; do
    command -v $name >/dev/null || missing+=("$name")
  done
  if [ "$(id -u)" != 0 ]; then
    echo "a Slurm of several nodes needs root, for their namespaces"
  elif [ ${#missing[@]} != 0 ]; then
    echo "${missing[*]}: not installed; apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
  elif ! unshare --net --mount --uts --pid --fork --mount-proc true 2>/dev/null; then
    echo "this machine lets even root make no namespaces"
  elif ! { ip link add "$BRIDGE" type bridge && ip link del "$BRIDGE"; } 2>/dev/null && [ ! -e "$DIR/pids" ]; then
    echo "this machine has no network bridges"
  fi
}

proctrack() {
  if [ -n "${PROCTRACK:-}" ]; then
    echo "$PROCTRACK"
  elif [ -w $FREEZER/cgroup.procs ]; then
    echo cgroup
  else
    log "proctrack/pgid in place of proctrack/cgroup: $FREEZER cannot be written here"
    echo pgid
  fi
}

# free_network: print the first network of RFC 2544's range, which no real network uses, that no other cluster has taken
free_network() {
  local third
  for third in $(seq 1 254); do
    ip -4 -o address show | grep -q "inet 198\.18\.$third\." || break
  done
  echo "198.18.$third"
}

write_config() {
  local num_nodes=$1 network=$2 proctrack=$3 i
  mkdir -p "$DIR"/{etc,run,log,state,spool,dev,bin}
  dd if=/dev/urandom of="$DIR/etc/munge.key" bs=128 count=1 status=none
  chmod 600 "$DIR/etc/munge.key"
  {
    echo "127.0.0.1 localhost"
    echo "$network.254 $CONTROLLER"
    for i in $(seq "$num_nodes"); do echo "$network.$i $NODE$i"; done
  } >"$DIR/etc/hosts"
  {
    cat <<CONF
ClusterName=$BRIDGE
SlurmctldHost=$CONTROLLER($network.254)
SlurmctldPort=$CONTROLLER_PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=$CRED_EXPIRE
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
ProctrackType=proctrack/$proctrack
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
PropagateResourceLimitsExcept=MEMLOCK
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
MinJobAge=86400
KillWait=$KILL_WAIT
UnkillableStepTimeout=30
SlurmdTimeout=10
MessageTimeout=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
CONF
    for i in $(seq "$num_nodes"); do
      echo "NodeName=$NODE$i NodeAddr=$network.$i Port=$NODE_PORT CPUs=$CPUS RealMemory=512000 Gres=gpu:$GPUS State=UNKNOWN"
    done
    echo "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=5 PreemptMode=OFF"
    echo "PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE"
    echo "PartitionName=cancel Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime=0"
    echo "PartitionName=notice Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime=5"
    echo "PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF"
  } >"$SLURM_CONF"
  # A GPU needs File=, or slurmd reports none; any file will do. Copies of /dev/null named nvidia0 and so on make Slurm
  # set CUDA_VISIBLE_DEVICES to 0,1,...
  for i in $(seq 0 $((GPUS - 1))); do mknod "$DIR/dev/nvidia$i" c 1 3; done
  {
    echo "AutoDetect=off"
    echo "NodeName=${NODE}[1-$num_nodes] Name=gpu File=$DIR/dev/nvidia[0-$((GPUS - 1))]"
  } >"$DIR/etc/gres.conf"
  # slurmd 22.05 loads a cgroup plugin even where nothing uses it; only newer versions know the word disabled.
  if [ "$proctrack" != cgroup ] && slurmd -V | awk '{ split($2, v, "."); exit !(v[1] + v[2] / 100 >= 24.05) }'; then
    echo CgroupPlugin=disabled
  else
    echo CgroupPlugin=cgroup/v1
  fi >"$DIR/etc/cgroup.conf"
  # The real sacct needs a data base. This one answers submitit's `sacct -o JobID,State,NodeList --parsable2 -j ID` from
  # squeue, where MinJobAge keeps ended jobs.
  cat >"$DIR/bin/sacct" <<'SACCT'
#!/usr/bin/env bash
ids=
while [ $# -gt 0 ]; do
  case $1 in
    -j | --jobs) ids+=" $2" && shift ;;
    -j*) ids+=" ${1#-j}" ;;
    --jobs=*) ids+=" ${1#*=}" ;;
  esac
  shift
done
echo "JobID|State|NodeList"
for id in ${ids//,/ }; do squeue -h -r -t all -j "$id" -o "%i|%T|%N" 2>/dev/null; done
SACCT
  chmod +x "$DIR/bin/sacct"
}

start_node() {
  local i=$1 pid
  mkdir -p "$DIR/spool/$NODE$i"
  in_background "$NODE$i" unshare --uts --mount --net --pid --fork --kill-child --mount-proc \
    env SLURM_CLUSTER_DIR="$DIR" bash "$SELF" _node "$i"
  pid=$(pid_of_node "$i")
  wait_for 5 "the network namespace of $NODE$i" \
    bash -c "[ \"\$(readlink /proc/$pid/ns/net)\" != \"\$(readlink /proc/self/ns/net)\" ]"
  ip link add "$BRIDGE-h$i" type veth peer name "$BRIDGE-n$i"
  ip link set "$BRIDGE-h$i" master "$BRIDGE" up
  ip link set "$BRIDGE-n$i" netns "$pid" name eth0
}

pid_of_node() { awk -v name="$NODE$1" '$3 == name { pid = $1 } END { print pid }' "$DIR/pids"; }

# be_node I: be the first process in a node's process namespace; everything on the node ends with it
be_node() {
  local i=$1
  hostname "$NODE$i"
  mount --bind "$DIR/etc/hosts" /etc/hosts
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
  ip link set lo up
  ip address add "$(awk -v name="$NODE$i" '$2 == name { print $1 }' /etc/hosts)/24" dev eth0
  ip link set eth0 up
  # NCCL reads /sys/class/net. Without a sysfs of its own the node would show the machine's interfaces; cgroups stay.
  mkdir -p "$DIR/run/cgroup"
  if mount --rbind /sys/fs/cgroup "$DIR/run/cgroup" && mount -t sysfs sysfs /sys; then
    mount --rbind "$DIR/run/cgroup" /sys/fs/cgroup
  fi
  cd /
  slurmd -D -N "$NODE$i" -f "$SLURM_CONF" &
  while :; do # collect the orphans, as a first process must
    wait -n || true
    jobs -r | grep -q . || exit 0
  done
}

are_idle() { [ "$(sinfo -h -N -p debug -o %t | grep -c '^idle$')" = "$1" ]; }

up() {
  local num_nodes=${1:-2} reason network proctrack i
  [ ! -e "$DIR/pids" ] || die "$DIR is in use; \`$0 down\` first"
  reason=$(why_not)
  [ -z "$reason" ] || die "$reason"
  proctrack=$(proctrack)
  mkdir -p "$DIR"
  : >"$DIR/pids"
  trap '[ $? = 0 ] || give_up' EXIT
  network=$(free_network)
  ip link add "$BRIDGE" type bridge
  ip address add "$network.254/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  write_config "$num_nodes" "$network" "$proctrack"
  in_background munged munged --foreground --force --num-threads=4 --socket="$DIR/run/munge.sock" \
    --key-file="$DIR/etc/munge.key" --pid-file="$DIR/run/munged.pid" --seed-file="$DIR/run/munge.seed"
  wait_for 10 munged munge -n -S "$DIR/run/munge.sock"
  in_background slurmctld slurmctld -D -f "$SLURM_CONF"
  for i in $(seq "$num_nodes"); do start_node "$i"; done
  wait_for 20 slurmctld bash -c 'scontrol ping | grep -q "is UP"'
  wait_for 30 "$num_nodes idle nodes" are_idle "$num_nodes"
  log "$num_nodes nodes under proctrack/$proctrack; export SLURM_CONF=$SLURM_CONF"
}

give_up() {
  rm -rf "$DIR.failed"
  cp -a "$DIR/log" "$DIR.failed" 2>/dev/null || true
  (down) || true
  log "not started; logs are in $DIR.failed"
}

# stop TERM|KILL PID START: end a process, by SIGKILL after four seconds
stop() {
  local tries
  is_alive "$2" "$3" || return 0
  kill -s "$1" "$2" 2>/dev/null || true
  for tries in $(seq 100); do
    is_alive "$2" "$3" || return 0
    [ "$tries" != 80 ] || kill -s KILL "$2" 2>/dev/null || true
    sleep 0.05
  done
  log "pid $2 does not end"
}

down() {
  local pid start name link folder
  [ -e "$DIR/pids" ] || die "nothing is up in $DIR"
  # The nodes end first, and every process of a job with them. Then the daemons end, newest first.
  while read -r pid start name; do [[ $name != "$NODE"* ]] || stop KILL "$pid" "$start"; done <"$DIR/pids"
  while read -r pid start name; do stop TERM "$pid" "$start"; done < <(tac "$DIR/pids")
  for link in $(ip -o link show type veth | sed -n "s/^[0-9]*: \($BRIDGE-h[0-9]*\)@.*/\1/p"); do
    ip link del "$link" 2>/dev/null || true
  done
  ip link del "$BRIDGE" 2>/dev/null || true
  for folder in "$FREEZER/slurm_$NODE"*; do # empty cgroups, which slurmd leaves behind
    [ ! -d "$folder" ] || find "$folder" -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
  rm -rf "$DIR"
}

kill_node() {
  local pid
  pid=$(pid_of_node "$1")
  stop KILL "$pid" "$(start_time "$pid")"
}

exec_in_node() {
  local pid children
  pid=$(pid_of_node "$1")
  shift
  children=$(cat "/proc/$pid/task/$pid/children") # unshare's child, which is the node's first process
  exec nsenter -t "${children%% *}" --all -- "$@"
}

status() {
  local pid start name
  [ -e "$DIR/pids" ] || die "nothing is up in $DIR"
  while read -r pid start name; do
    if is_alive "$pid" "$start"; then echo "$name $pid up"; else echo "$name $pid gone"; fi
  done <"$DIR/pids"
  timeout 10 sinfo -N -o "%N %t %C %G %E"
  timeout 10 squeue
}

case ${1:-} in
  check)
    reason=$(why_not)
    [ -z "$reason" ] || die "$reason"
    ;;
  up) up "${2:-2}" ;;
  down) down ;;
  env)
    echo "export SLURM_CONF=$SLURM_CONF"
    echo "export PATH=$DIR/bin:\$PATH"
    ;;
  status) status ;;
  exec)
    shift
    exec_in_node "$@"
    ;;
  kill-node) kill_node "$2" ;;
  start-node) start_node "$2" ;;
  _node) be_node "$2" ;;
  *)
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$SELF"
    exit 2
    ;;
esac
