#!/usr/bin/env bash
# Captures under Slurm, an array of any size:  sbatch --array 0-31 launch/examples/capture_slurm.sh CONFIG [key=value]
# Each task has one GPU and needs none of the others: a task takes its share of the units first and then whatever is
# left, whoever finds all of them committed completes the store, and a task that is preempted is queued again.
#SBATCH --job-name=clt-capture
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=clt-capture-%A_%a.log
set -euo pipefail
: "${SLURM_ARRAY_TASK_ID:?start with sbatch --array 0-N}"

rank=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
exec python launch/capture.py "$@" "workers.rank=$rank" "workers.world=$SLURM_ARRAY_TASK_COUNT"
