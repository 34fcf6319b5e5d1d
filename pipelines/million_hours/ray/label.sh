#!/bin/bash
# Label on a Ray cluster, from any of its machines (asr-kd[ray] on all of them, the same paths everywhere):
#   WORKERS=8 MOST=500 GPUS=1 pipelines/million_hours/ray/label.sh runs/million_hours/settings/soft-targets.yaml [key=value …]
# Start it again after whatever went wrong: it goes on with the shards that are not there.
set -euo pipefail
exec asr-kd label "$@" engine=ray ray_address="${RAY_ADDRESS:-auto}" \
  min_workers="${WORKERS:-1}" max_workers="${MOST:-null}" worker_gpus="${GPUS:-1}"
