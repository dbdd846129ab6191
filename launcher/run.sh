#!/usr/bin/env bash
# NGPU=8 launcher/run.sh --preset deepmim_vit_b_12 --data DIR: one node, all its accelerators.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec deepspeed --num_accelerators "${NGPU:-1}" "$(dirname "$0")/pretrain.py" "$@"
