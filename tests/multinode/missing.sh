#!/usr/bin/env bash
# A host that does not come is named by the others with its ranks, and so is a rank 0 that cannot be reached.
. "$(dirname "$0")/lab.sh"
need pdsh pdsh
lab_open
lab_ssh
lab_run
on 2 ip link set eth0 down
on 1 timeout --kill-after=10 "$LAB_SECONDS" "$PYTHON" deepy.py train.py "$LAB/tiny.yml" -H "$LAB/hostfile" >"$LAB/log" 2>&1
[ $? != 0 ] || { echo "the run went on without its second host"; exit 1; }
expect_text "$LAB/log" 'host node2: ssh cannot log into it \(ssh: connect to host node2 port 22: No route to host\)'

on 1 timeout --kill-after=10 "$LAB_SECONDS" "$PYTHON" deepy.py train.py "$LAB/tiny.yml" -H "$LAB/hostfile" \
  --set no_ssh_check=true check_in_seconds=6 >"$LAB/log" 2>&1
[ $? != 0 ] || { echo "the run went on without its second host"; exit 1; }
expect_text "$LAB/log" 'rank 1 \(node2\) of 2: did not come within 6 s; the others are on node1. node2.*(cannot be reached|does not answer)'

on 1 env RANK=1 WORLD_SIZE=2 MASTER_ADDR=node2 MASTER_PORT=23456 timeout --kill-after=10 "$LAB_SECONDS" "$PYTHON" train.py \
  "$LAB/tiny.yml" --set check_in_seconds=1 >"$LAB/log" 2>&1
expect_text "$LAB/log" 'rank 1 on node1: found no rank 0 at .* = node2:23456 within 1 s \(node2 (cannot be reached|does not answer)'
