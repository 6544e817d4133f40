#!/usr/bin/env bash
# deepy.py with a hostfile of two hosts, over pdsh and ssh: the losses of a local run, and the exit code of a failure.
. "$(dirname "$0")/lab.sh"
need pdsh pdsh
lab_open
lab_ssh
lab_run
deepy=("$PYTHON" deepy.py train.py "$LAB/tiny.yml" -H "$LAB/hostfile")

on 1 timeout "$LAB_SECONDS" "${deepy[@]}" >"$LAB/log" 2>&1 || { code=$?; tail -40 "$LAB/log"; exit $code; }
expect_text "$LAB/log" '2 processes on 2 hosts \(node1, node2\)'
same_losses pdsh
