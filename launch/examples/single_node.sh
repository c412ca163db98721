#!/usr/bin/env bash
# Trains on all GPUs of this machine:  launch/examples/single_node.sh configs/train/llava_7b.yaml [key=value ...]
# GPUS=4 uses four. When a rank dies, torchrun restarts all of them, up to three times, and training continues from the
# newest checkpoint. Ctrl-C or SIGTERM writes a checkpoint first, within SHUTDOWN seconds.
set -euo pipefail

exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" --max-restarts 3 \
    --shutdown-timeout "${SHUTDOWN:-110}" launch/train.py "$@"
