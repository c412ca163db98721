#!/usr/bin/env bash
# Trains on several machines without a scheduler. On each of them, from a checkout in the same place:
#   NODES=4 HEAD=first-machine launch/examples/multi_node.sh configs/train/llava_7b.yaml [key=value ...]
# All need the store and the output folder at the same path. HEAD is the name of one of them, which all can reach.
# mesh.layer x mesh.column should divide the GPUs of a machine: then only gradients, not codes, cross the network.
set -euo pipefail
: "${NODES:?number of machines}" "${HEAD:?name of one of them}"

exec torchrun --nnodes "$NODES" --nproc-per-node "${GPUS:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${JOB:-clt}" \
    --shutdown-timeout "${SHUTDOWN:-110}" launch/train.py "$@"
