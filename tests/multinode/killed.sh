#!/usr/bin/env bash
# A rank on host 2 is killed with -9: everything ends on both hosts within 10 seconds, with a code that is not 0.
. "$(dirname "$0")/lab.sh"
need pdsh pdsh
lab_open
lab_ssh
lab_run
on 1 timeout --kill-after=10 "$LAB_SECONDS" "$PYTHON" deepy.py train.py "$LAB/tiny.yml" -H "$LAB/hostfile" --set train_iters=100000 \
  >"$LAB/log" 2>&1 &
run=$!
await "$LAB_SECONDS" grep -Eq "iteration +3/" "$LAB/log"
begin=$(date +%s%N)
on 2 sh -c 'kill -KILL "$(pgrep -o -f "[-]u train.py --deepy-payload")"'
wait $run
code=$?
seconds=$((($(date +%s%N) - begin) / 1000000000))
[ $code != 0 ] || { echo "the run ended with 0"; tail -30 "$LAB/log"; exit 1; }
[ $seconds -lt 10 ] || { echo "it took $seconds s"; tail -30 "$LAB/log"; exit 1; }
expect_text "$LAB/log" 'rank 1 on host node2: The process was ended by SIGKILL'
for number in 1 2; do
  if on $number pgrep -f '[d]eepy-payload'; then echo "processes are left on node$number"; exit 1; fi
done
