# Sourced by what starts runs: settings without which a launcher computes other bits, or never ends.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# ssh gives up on a host that is gone; else `deepspeed` waits for it for ever.
export PDSH_SSH_ARGS_APPEND=${PDSH_SSH_ARGS_APPEND:-"-o ServerAliveInterval=15 -o ServerAliveCountMax=3"}
# What `deepspeed` hands over to other hosts beside PYTHON*.
export DS_ENV_FILE=${DS_ENV_FILE:-$(realpath "$(dirname "${BASH_SOURCE[0]}")")/deepspeed_env}
# torchrun's restarts connect to new addresses instead of those of the ranks that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# It waits for a save before it kills.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
