#!/usr/bin/env bash
# Debian's Slurm with a controller and two nodes: train.py under srun, and deepy.py in a job without any hostfile.
. "$(dirname "$0")/lab.sh"
need slurmctld slurmctld
need slurmd slurmd
need srun slurm-client
need munged munge
lab_open
lab_run
lab_slurm

on 1 timeout --kill-after=10 "$LAB_SECONDS" srun --nodes=2 --ntasks-per-node=1 "$PYTHON" train.py "$LAB/tiny.yml" \
  --set save="$LAB/checkpoints_srun" runs_dir="$LAB/srun/runs" >"$LAB/log" 2>&1
expect_code 0 $? srun
expect_text "$LAB/log" '2 processes on 2 hosts \(node1, node2\)'
same_losses srun "$LAB/srun"

on 1 timeout --kill-after=10 "$LAB_SECONDS" salloc --nodes=2 --ntasks-per-node=1 "$PYTHON" deepy.py train.py "$LAB/tiny.yml" \
  --set launcher=slurm comment=lab >"$LAB/log" 2>&1
expect_code 0 $? "deepy.py in a job"
same_losses "deepy.py in a job"

failing_script 7 0
on 1 timeout --kill-after=10 "$LAB_SECONDS" salloc --nodes=2 --ntasks-per-node=1 "$PYTHON" deepy.py "$LAB/failing.py" "$LAB/tiny.yml" \
  --set launcher=slurm >"$LAB/log" 2>&1
expect_code 7 $? "a rank that fails with 7"
