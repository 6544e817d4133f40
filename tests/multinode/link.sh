#!/usr/bin/env bash
# The link to host 2 is taken down: host 1 ends with a code that is not 0, and says which rank it lost.
. "$(dirname "$0")/lab.sh"
lab_open
lab_run
for number in 1 2; do
  on $number env RANK=$((number - 1)) WORLD_SIZE=2 MASTER_ADDR=node1 MASTER_PORT=23456 timeout --kill-after=10 "$LAB_SECONDS" \
    "$PYTHON" train.py "$LAB/tiny.yml" --set train_iters=100000 >"$LAB/log$number" 2>&1 &
  ranks[$number]=$!
done
await "$LAB_SECONDS" grep -Eq "iteration +3/" "$LAB/log1"
begin=$(date +%s)
on 2 ip link set eth0 down
for number in 1 2; do
  wait "${ranks[$number]}"
  code=$?
  cp "$LAB/log$number" "$LAB/log"
  [ $code != 0 ] && [ $code != 124 ] || { echo "rank $((number - 1)): exit code $code"; tail -30 "$LAB/log"; exit 1; }
done
expect_text "$LAB/log1" 'rank 1 of 2 on host node2 was lost at step [0-9]+|rank 0 of 2 on host node1'
expect_text "$LAB/log2" 'rank 1 on host node2 ends at step [0-9]+ because the machine or the watch of rank 0 is gone'
echo "both ranks ended $(($(date +%s) - begin)) s after the link was taken down"
