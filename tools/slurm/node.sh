#!/usr/bin/env bash
# What job.sh runs on a node, in a container if there is one: node.sh check|show|train CONFIG.yaml [a.b=c …], or report LOGS
#
#   check   check all that can be known before the ranks start, and print the run's folder
#   show    print the configuration with every default
#   train   start this node's ranks
#   report  name the node and the rank that failed first
set -euo pipefail
action=$1
shift
# shellcheck disable=SC1091
[ -n "${CONTAINER:-}" ] || [ ! -e "$VENV/bin/activate" ] || . "$VENV/bin/activate"
if [ -z "${DRY_RUN:-}" ] && ! python -c 'import dapo_mcore' 2>/dev/null; then
  [ "$action" != show ] || { echo "# not shown: there is no python with dapo_mcore here" && exit; }
  echo "no python with dapo_mcore on $(hostname): set VENV (now $VENV), or CONTAINER" >&2
  exit 2
fi
config=(python -m dapo_mcore.cli config "$@")

environment() {  # each line can be replaced from outside
  # compiled kernels on a disk of the node, apart for each job: on a network file system they would be slow, or stale
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/dapo_mcore-$UID-${SLURM_JOB_ID:-0}/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/dapo_mcore-$UID-${SLURM_JOB_ID:-0}/inductor}
  # Megatron's order of kernels for sequence parallelism; Blackwell does not need it
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # Where the fabric is not found by itself (NCCL_DEBUG=INFO says what is used), set in the job's environment:
  #   NCCL_SOCKET_IFNAME  interfaces for NCCL's bootstrap, a prefix or list (=eth0, ^docker)
  #   GLOO_SOCKET_IFNAME  exactly one interface, for the control group; needed where a host's name means 127.0.0.1
  #   NCCL_IB_HCA         InfiniBand or RoCE adapters (=mlx5_0,mlx5_1); NCCL_IB_GID_INDEX for RoCE
  #   FI_PROVIDER=efa     on AWS, with the plugin aws-ofi-nccl
  ulimit -n "$(ulimit -Hn)"
}

case $action in
  check)
    "${config[@]}" --processes "$((NODES * RANKS_PER_NODE))" >/dev/null
    echo "run_dir=$("${config[@]}" --run-dir)"
    ;;
  report) python -m dapo_mcore.process.failures "$@" ;;
  show) "${config[@]}" --only-values ;;
  train)
    logs=RUN/logs/$ATTEMPT/NODE
    [ -n "${DRY_RUN:-}" ] || logs=$("${config[@]}" --run-dir | tail -n 1)/logs/$ATTEMPT/$SLURMD_NODENAME
    is_host=$([ "${SLURM_NODEID:-0}" = 0 ] && echo 1 || echo 0)
    command=(torchrun --nnodes "$NODES" --nproc-per-node "$RANKS_PER_NODE" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS"
      --rdzv-conf "is_host=$is_host"
      --rdzv-id "$ATTEMPT" --max-restarts 0 --shutdown-timeout "$SAVE_SECONDS" --log-dir "$logs" --tee 3 --local-ranks-filter 0
      -m dapo_mcore.train "$@")
    if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "${command[@]}" && echo && exit; fi
    environment
    mkdir -p "$logs"
    status=0
    { "${command[@]}" || status=$?; } 2> >(tee "$logs/torchrun.log" >&2)
    wait $! # for tee
    exit "$status"
    ;;
esac
