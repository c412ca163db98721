#!/usr/bin/env bash
# Captures on all GPUs of this machine:  launch/examples/capture.sh configs/capture/llava_7b.yaml [key=value ...]
# WORKERS=4 starts four processes, one per GPU. They share the units through the store, so that one that dies costs only
# the unit it was at; start the script again, also on further machines meanwhile, until it says that the store is done.
set -euo pipefail

exec torchrun --standalone --nproc-per-node "${WORKERS:-gpu}" --max-restarts 3 launch/capture.py "$@"
