#!/usr/bin/env bash
# train.py under two agents of torchrun, one on each host, as `deepy.py --print` shows it.
. "$(dirname "$0")/lab.sh"
lab_open
lab_run
where=(--nnodes=2 --nproc_per_node=1 --master_addr=node1 --master_port=29500)
for number in 1 2; do
  on $number timeout --kill-after=10 "$LAB_SECONDS" "$PYTHON" -m torch.distributed.run "${where[@]}" --node_rank=$((number - 1)) \
    train.py "$LAB/tiny.yml" >"$LAB/log$number" 2>&1 &
done
for number in 2 1; do
  cp "$LAB/log$number" "$LAB/log"
  wait -n
  code=$?
  cat "$LAB"/log[12] >"$LAB/log"
  expect_code 0 $code "an agent"
done
expect_text "$LAB/log1" '2 processes on 2 hosts \(node1, node2\)'
same_losses torchrun
