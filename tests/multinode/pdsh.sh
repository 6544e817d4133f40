#!/usr/bin/env bash
# deepy.py with a hostfile of two hosts, over pdsh and ssh: the losses of a local run, and the exit code of a failure.
. "$(dirname "$0")/lab.sh"
need pdsh pdsh
lab_open
lab_ssh
lab_run
deepy=(timeout --kill-after=10 "$LAB_SECONDS" "$PYTHON" deepy.py)

on 1 "${deepy[@]}" train.py "$LAB/tiny.yml" -H "$LAB/hostfile" >"$LAB/log" 2>&1
expect_code 0 $? pdsh
expect_text "$LAB/log" '2 processes on 2 hosts \(node1, node2\)'
expect_text "$LAB/log" 'all-reduce of 1 MiB over 2 ranks on 2 hosts: [0-9.]+ ms'
same_losses pdsh

failing_script 7 0
on 1 "${deepy[@]}" "$LAB/failing.py" "$LAB/tiny.yml" -H "$LAB/hostfile" >"$LAB/log" 2>&1
expect_code 7 $? "a rank that fails with 7"
failing_script 75 75
on 1 "${deepy[@]}" "$LAB/failing.py" "$LAB/tiny.yml" -H "$LAB/hostfile" >"$LAB/log" 2>&1
expect_code 75 $? "ranks that end with 75"
