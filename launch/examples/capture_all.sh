#!/usr/bin/env bash
# Captures one job after another on this machine:  launch/examples/capture_all.sh configs/capture/{amber,llava_7b}.yaml
# A job that fails does not stop the others. Run the same line again to repeat it; finished stores are left unchanged.
set -euo pipefail

failed=()
for config in "$@"; do
    launch/examples/capture.sh "$config" || failed+=("$config")
done
if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
