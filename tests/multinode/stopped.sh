#!/usr/bin/env bash
# The launcher is asked to stop: all ranks save and end with 75, and the same command goes on to the local run's losses.
. "$(dirname "$0")/lab.sh"
need pdsh pdsh
lab_open
lab_ssh
lab_run
command=(timeout --kill-after=10 "$LAB_SECONDS" "$PYTHON" deepy.py train.py "$LAB/tiny.yml" -H "$LAB/hostfile")

on 1 "${command[@]}" --set "${SLOWLY[@]}" >"$LAB/log" 2>&1 &
run=$!
await "$LAB_SECONDS" grep -Eq "iteration +1/" "$LAB/log"
kill -TERM "$(inner $run)"
wait $run
expect_code 75 $? "a run that is asked to stop"
expect_text "$LAB/log" 'stopped at iteration [123] because SIGTERM'
on 1 "${command[@]}" >"$LAB/log" 2>&1
expect_code 0 $? "the same command again"
same_losses "stopped with SIGTERM and gone on"
