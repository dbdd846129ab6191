#!/usr/bin/env bash
# One node:       NGPU=8 launcher/run.sh --preset deepmim_vit_b_12 --data DIR
# Several nodes:  HOSTFILE=hosts launcher/run.sh --preset ...
# ENTRY=launcher/finetune.py fine-tunes instead.
set -euo pipefail
here=$(dirname "$0")
. "$here/environment.sh"
if [ -n "${HOSTFILE:-}" ]; then
  where=(--hostfile "$HOSTFILE")
  hosts=(--hostfile "$HOSTFILE")
else
  where=(--num_accelerators "${NGPU:-1}")
  hosts=(--gpus-per-node "${NGPU:-1}")
fi
line=(deepspeed "${where[@]}" "${ENTRY:-$here/pretrain.py}" "$@")
printf 'runs:'
printf ' %q' "${line[@]}"
echo
deepmim-scale ranks "${hosts[@]}" -- "$@"
exec "${line[@]}"
