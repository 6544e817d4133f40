#!/usr/bin/env bash
# A batch job of Slurm that is pre-empted by a signal: the ranks save, the job is requeued and goes on by itself.
. "$(dirname "$0")/lab.sh"
need slurmctld slurmctld
need slurmd slurmd
need srun slurm-client
need munged munge
lab_open
lab_run
lab_slurm
cat >"$LAB/job.sh" <<SH
#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append --signal=USR1@120 --output=$LAB/log
set=(--set launcher=slurm slurm_requeue=true)
[ -n "\$SLURM_RESTART_COUNT" ] || set+=(${SLOWLY[*]})
cd $ROOT && exec $PYTHON deepy.py train.py $LAB/tiny.yml "\${set[@]}"
SH
job=$(on 1 sbatch --parsable "$LAB/job.sh") || { echo "sbatch failed"; exit 1; }
await 60 grep -Eq "iteration +1/" "$LAB/log"
on 1 scancel --signal=USR1 "$job"  # to every task of the step, as --signal does when the time limit comes near
await 60 grep -Eq 'stopped at iteration [123] because SIGUSR1' "$LAB/log"
is_pending() { [ "$(on 1 squeue -h -j "$job" -o %T)" = PENDING ]; }
await 30 is_pending
on 1 scontrol update JobId="$job" StartTime=now  # Slurm lets a requeued job wait for two minutes
await 60 grep -Eq 'iteration +4/' "$LAB/log"
is_over() { [ "$(on 1 squeue -h -j "$job" -o %T)" != RUNNING ]; }
await 30 is_over
same_losses "requeued after SIGUSR1"
