#!/usr/bin/env bash
# Trains under Slurm:  OUTPUT=runs/llava/clt sbatch --nodes 4 launch/examples/slurm.sh configs/train/llava_7b.yaml
# One torchrun per node starts one rank per GPU. Two minutes before the time limit, and at preemption, Slurm sends
# SIGTERM: the ranks write a checkpoint and exit. A job that made progress is queued again and continues from there; one
# that failed without progress, from a wrong configuration for instance, is not.
#SBATCH --job-name=clt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=clt-%j.log
set -euo pipefail
: "${OUTPUT:?folder for checkpoints, on a file system that all nodes reach}"

newest() { cat "$OUTPUT/latest" 2>/dev/null || echo none; }

started_at=$(newest)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# When one node is done, the others have a minute to exit by themselves.
if srun --kill-on-bad-exit=0 --wait=60 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    --shutdown-timeout 110 launch/train.py "$@" "output=$OUTPUT"; then
    exit 0
fi
if [ "$(newest)" != "$started_at" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit 1
