#!/usr/bin/env bash
# Captures on all GPUs of this machine:  launch/examples/capture.sh configs/capture/llava_7b.yaml [key=value ...]
# WORKERS=4 starts four processes, one per GPU. They share the units through the store: if one dies, its current unit is
# lost and nothing else. Start the script again, also on further machines, until it prints the id of the store.
set -euo pipefail

exec torchrun --standalone --nproc-per-node "${WORKERS:-gpu}" --max-restarts 3 launch/capture.py "$@"
