#!/usr/bin/env bash
# Captures under Slurm, an array of any size:  sbatch --array 0-31 launch/examples/capture_slurm.sh CONFIG [key=value]
# Tasks have one GPU each and do not depend on each other: each captures its share of the units, then any that are left,
# and the one that finds all units committed completes the store. A preempted task is queued again.
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
