# Two machines on this one: node1 and node2, each with its own network, host name, processes, /etc/hosts and /run.
#
# Sourced by the scripts beside it. A host is an `unshare` whose first process holds everything that runs in it, so
# ending that process ends the host, whatever it was doing. Nothing is written outside of $LAB: the private mounts hide
# the machine's own ssh configuration and /run. Needs root and a kernel that allows namespaces.

: "${PYTHON:=.venv/bin/python}" "${LAB_SECONDS:=60}"
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$ROOT"
PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONPATH=$ROOT
unset DLTS_HOSTFILE RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
LAB= HOSTS=()

skip() { echo "skipped: $*" >&3; exit 77; }

need() {  # need PROGRAM PACKAGE: skip the script where a program is missing
  PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null || skip "$1 is not installed (apt-get install $2)"
}

lab_open() {
  exec 3>&1
  trap lab_close EXIT
  trap 'exit 143' TERM INT HUP
  [ "$(id -u)" = 0 ] || skip "needs root"
  export PATH=$PATH:/usr/sbin:/sbin
  need ip iproute2
  LAB=$(mktemp -d /tmp/deepy-lab.XXXXXX)
  chmod 755 "$LAB"
  printf '127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n' >"$LAB/hosts"
  local number
  for number in 1 2; do lab_host $number || skip "this kernel allows no namespaces here"; done
  ip link add "dy$$a" netns "${HOSTS[0]}" type veth peer name "dy$$b" netns "${HOSTS[1]}" || skip "no veth interfaces here"
  on 1 sh -c "ip link set dy$$a name eth0; ip addr add 10.77.0.1/24 dev eth0; ip link set eth0 up"
  on 2 sh -c "ip link set dy$$b name eth0; ip addr add 10.77.0.2/24 dev eth0; ip link set eth0 up"
}

lab_host() {  # lab_host NUMBER: start a host, and wait until it is ready
  local number=$1 ready="$LAB/ready$1" pid
  mkdir -p "$LAB/etc$number"
  mkfifo "$ready"
  unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc sh -c "
    exec 3<&- 2>>'$LAB/host$number.log'
    hostname node$number && ip link set lo up && mount -t tmpfs tmpfs /run && mkdir -p /run/sshd &&
    mount --bind '$LAB/hosts' /etc/hosts && echo ready >'$ready' && exec sleep infinity; echo failed >'$ready'" &
  pid=$!
  [ "$(timeout 10 cat "$ready")" = ready ] || return 1
  LAUNCHED+=("$pid")
  HOSTS+=("$(cat /proc/$pid/task/$pid/children | tr -d ' ')")
}
LAUNCHED=()

on() {  # on NUMBER COMMAND...: run a command on a host
  local pid=${HOSTS[$1 - 1]}
  shift
  nsenter --target "$pid" --net --uts --ipc --mount --pid --wdns="$PWD" "$@"
}

lab_ssh() {  # let the hosts log into each other by ssh, with keys and configuration of this lab alone
  need sshd openssh-server
  need ssh openssh-client
  local sshd number
  sshd=$(command -v sshd)
  ssh-keygen -q -t ed25519 -N '' -f "$LAB/host_key"
  ssh-keygen -q -t ed25519 -N '' -f "$LAB/id"
  cp "$LAB/id.pub" "$LAB/authorized_keys"
  chmod 600 "$LAB/id" "$LAB/authorized_keys"
  printf '%s\n' "HostKey $LAB/host_key" "AuthorizedKeysFile $LAB/authorized_keys" 'PermitRootLogin prohibit-password' \
    'PasswordAuthentication no' 'UsePAM no' 'StrictModes no' 'PidFile none' 'SetEnv XDG_RUNTIME_DIR=/run' >"$LAB/sshd_config"
  printf '%s\n' 'Host *' " IdentityFile $LAB/id" ' IdentitiesOnly yes' ' StrictHostKeyChecking no' \
    ' UserKnownHostsFile /dev/null' ' LogLevel ERROR' >"$LAB/ssh_config"
  for number in 1 2; do
    on $number mount --bind "$LAB/ssh_config" /etc/ssh/ssh_config
    on $number "$sshd" -f "$LAB/sshd_config" -E "$LAB/sshd$number.log"
  done
  printf 'node1 slots=1\nnode2 slots=1\n' >"$LAB/hostfile"
}

lab_close() {
  local code=$?
  trap - EXIT
  local pid
  for pid in "${LAUNCHED[@]}"; do kill -KILL "$pid" 2>/dev/null; done
  for pid in "${LAUNCHED[@]}"; do wait "$pid" 2>/dev/null; done
  [ -z "$LAB" ] || [ -n "${LAB_KEEP:-}" ] || rm -rf "$LAB" 2>/dev/null || { sleep 1; rm -rf "$LAB"; }  # the last processes of a host may still have written
  exit $code
}

# --- the training run that every script starts, and what must come of it ---

# Keys that change no loss of a training step and give each step a second, for a signal to arrive in between.
SLOWLY=(eval_interval=1 eval_iters=60)

lab_run() {  # write the tiny config and corpus into $LAB, and the local run's losses, once for all scripts of a driver
  REFERENCE=${REFERENCE:-$LAB/reference}
  "$PYTHON" tests/multinode/tiny_run.py write "$LAB" || exit 1
  [ -f "$REFERENCE/local.json" ] || "$PYTHON" tests/multinode/tiny_run.py local "$REFERENCE" || exit 1
}

same_losses() {  # same_losses WHAT [FOLDER]: the run in the lab has the losses of the local run of the same layout
  "$PYTHON" tests/multinode/tiny_run.py compare "${2:-$LAB}" "$REFERENCE" "$1"
}

expect_code() {  # expect_code WANTED GOT WHAT
  [ "$1" = "$2" ] || { echo "$3: exit code $2, and not $1; the log ends with:"; tail -30 "$LAB/log"; exit 1; }
}

expect_text() {  # expect_text FILE PATTERN: the file has a line with the pattern
  grep -Eq -- "$2" "$1" || { echo "'$2' is not in $1, which ends with:"; tail -30 "$1"; exit 1; }
}

failing_script() {  # failing_script CODE_OF_RANK_1 CODE_OF_RANK_0: a script without torch whose ranks end with these
  cat >"$LAB/failing.py" <<PY
import sys, time
from megatron.launch.place import find_place
from megatron.launch.prelude import prepare
import os
prepare(__file__)
rank = find_place(os.environ).rank
time.sleep(0.3 * (1 - rank))
sys.exit($1 if rank else $2)
PY
}

inner() {  # inner PID: the process that a background `on` started on its host, as this machine numbers it
  local child
  child=$(tr -d ' ' <"/proc/$1/task/$1/children")
  tr -d ' ' <"/proc/$child/task/$child/children"
}

await() {  # await SECONDS COMMAND...: try until the command succeeds
  local tries=$(($1 * 10))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $((tries -= 1)) -gt 0 ] || { echo "never came true: $*"; [ ! -f "$LAB/log" ] || tail -30 "$LAB/log"; exit 1; }
    sleep 0.1
  done
}

lab_slurm() {  # start a controller on node1 and a slurmd on either host; everything of theirs lies in $LAB
  local number conf=$LAB/slurm.conf
  dd if=/dev/urandom of="$LAB/munge.key" bs=128 count=1 status=none
  chmod 600 "$LAB/munge.key"
  cat >"$conf" <<CONF
ClusterName=lab
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$LAB/slurmctld.log
SlurmdLogFile=$LAB/slurmd%n.log
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=20
NodeName=node[1-2] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
  mkdir -p "$LAB/state"
  export SLURM_CONF=$conf
  for number in 1 2; do
    on $number munged --force --key-file="$LAB/munge.key" --socket=/run/munge.socket --pid-file=/run/munged.pid \
      --log-file="$LAB/munged$number.log" --seed-file="$LAB/munged$number.seed" || skip "munged does not start here"
  done
  on 1 slurmctld -c
  for number in 1 2; do on $number slurmd -N node$number || skip "slurmd does not start here"; done
  await 20 slurm_is_up
}

slurm_is_up() { [ "$(on 1 sinfo -h -t idle -o %D)" = 2 ]; }
