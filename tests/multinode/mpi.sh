#!/usr/bin/env bash
# mpi.sh openmpi|mpich: deepy.py over an MPI's launcher: the losses of a local run, and the exit code of a failure.
. "$(dirname "$0")/lab.sh"
kind=${1:?openmpi or mpich}
case $kind in
  openmpi) need mpirun.openmpi openmpi-bin ;;
  mpich) need mpiexec.hydra mpich ;;
esac
lab_open
lab_ssh
lab_run
deepy=(timeout --kill-after=10 "$LAB_SECONDS" "$PYTHON" deepy.py)
options=(-H "$LAB/hostfile" --set "launcher=$kind")

on 1 "${deepy[@]}" train.py "$LAB/tiny.yml" "${options[@]}" >"$LAB/log" 2>&1
expect_code 0 $? "$kind"
expect_text "$LAB/log" '2 processes on 2 hosts \(node1, node2\)'
same_losses "$kind"

failing_script 7 0
on 1 "${deepy[@]}" "$LAB/failing.py" "$LAB/tiny.yml" "${options[@]}" >"$LAB/log" 2>&1
expect_code 7 $? "a rank that fails with 7"
failing_script 75 75
on 1 "${deepy[@]}" "$LAB/failing.py" "$LAB/tiny.yml" "${options[@]}" >"$LAB/log" 2>&1
expect_code 75 $? "ranks that end with 75"
