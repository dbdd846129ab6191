# Sourced by the jobs: one torchrun per node, and a job that goes on after its time limit.
. launcher/environment.sh

# train SCRIPT FLAGS: on all nodes of the job, as many processes per node as it has GPUs.
train() {
  local hosts head per_node step line
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
  head=${hosts%%,*}
  per_node=${SLURM_GPUS_ON_NODE:-${SLURM_CPUS_ON_NODE:-1}}
  # Slurm signals this script before the time is up. The ranks then get SIGTERM, and save.
  trap 'echo "time is nearly up: requeued"; scontrol requeue "$SLURM_JOB_ID"' USR1
  line=(torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$per_node" --max-restarts 3
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$head:$((20000 + SLURM_JOB_ID % 10000))"
    "$@")
  printf 'runs:'
  printf ' %q' "${line[@]}"
  echo
  deepmim-scale ranks --hosts "$hosts" --gpus-per-node "$per_node" -- "${@:2}"
  srun --kill-on-bad-exit=1 "${line[@]}" &
  step=$!
  # A trap ends the first wait, not what it waits for.
  while kill -0 "$step" 2>/dev/null; do wait "$step" && return 0; done
  wait "$step"
}
