#!/usr/bin/env bash
# Two hosts, one rank each, started by nobody but plain variables: a killed rank, and a stopped one.
. "$(dirname "$0")/lab.sh"
lab_open
"$PYTHON" tests/multinode/tiny_run.py write "$LAB" || exit 1
keys=(train_iters=1000000 checkpoint_factor=1000000 eval_interval=1000000 log_interval=20 resume=never save=null)

train() {  # train KEY=VALUE...: start both ranks, and wait until they train
  local rank sets=()
  for key in "${keys[@]}" "$@"; do sets+=(--set "$key"); done
  for rank in 0 1; do
    on $((rank + 1)) env RANK=$rank WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=node1 MASTER_PORT=29600 \
      "$PYTHON" train.py "$LAB/tiny.yml" "${sets[@]}" >"$LAB/log$rank" 2>&1 &
    pids[$rank]=$!
  done
  await 60 grep -q 'iteration  *40/' "$LAB/log0"
}

ends() {  # ends RANK SECONDS: the rank ends with a code that is not 0
  local code=0
  await "$2" sh -c "! kill -0 ${pids[$1]}"
  wait "${pids[$1]}" || code=$?
  [ $code != 0 ] || { echo "rank $1 ended as if all were well"; exit 1; }
}

train
kill -KILL "$(inner "${pids[1]}")"
ends 1 5; ends 0 10
await 3 expect_text "$LAB/log1" 'rank 1 of 2 on host node2 failed at step [0-9]+, .*exit code (137|1)\.'
expect_text "$LAB/log0" 'rank 0 on host node1 ends because rank 1 on host node2 failed at step'

train
kill -KILL "$(inner "${pids[0]}")"
ends 0 5; ends 1 10
await 3 expect_text "$LAB/log0" 'rank 0 of 2 on host node1 failed at step [0-9]+, .*exit code (137|1)\.'

train hang_timeout_minutes=0.1
kill -STOP "$(inner "${pids[1]}")"
ends 0 25
kill -CONT "$(tr -d ' ' <"/proc/${pids[1]}/task/${pids[1]}/children")"  # nsenter stops itself with its command
ends 1 10
expect_text "$LAB/log0" 'The run hangs: no rank has made progress'
expect_text "$LAB/log0" 'rank 1 \(host node2\) is in .* and is stopped'
