#!/usr/bin/env bash
# What job.sh runs on a node, in a container if there is one: node.sh check|show|doctor|train CONFIG.yaml [a.b=c …], or report LOGS
#
#   check   check all that can be known before the ranks start, and print the run's folder
#   show    check the layout and print the configuration with every default
#   doctor  examine this node, and with the others the network between them
#   train   start this node's ranks
#   report  name the node and the rank that failed first
set -euo pipefail
action=$1
shift
# shellcheck disable=SC1091
[ -n "${CONTAINER:-}" ] || [ ! -e "$VENV/bin/activate" ] || . "$VENV/bin/activate"
# in the checkout's folder any python imports the package, also one without what it needs
if [ -z "${DRY_RUN:-}" ] && ! python -c 'import dapo_mcore, importlib.util as util; exit(util.find_spec("torch") is None)' 2>/dev/null; then
  [ "$action" != show ] || { echo "# not shown: there is no python with dapo_mcore and torch here" && exit; }
  echo "no python with dapo_mcore and torch on $(hostname): set VENV (now $VENV), or CONTAINER" >&2
  exit 2
fi
config=(python -m dapo_mcore.cli config "$@")

environment() {  # each line can be replaced from outside
  # Megatron's order of kernels for sequence parallelism; Blackwell does not need it
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # gloo would take the address of the host's name, which on many systems is 127.0.1.1
  [ -z "$interface" ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
  # Where the fabric is not found by itself (NCCL_DEBUG=INFO says what is used), set in the job's environment:
  #   NCCL_SOCKET_IFNAME  interfaces for NCCL's bootstrap, a prefix or list (=eth0, ^docker)
  #   GLOO_SOCKET_IFNAME  exactly one interface, for the control group (default: the one on the way to the first node)
  #   NCCL_IB_HCA         InfiniBand or RoCE adapters (=mlx5_0,mlx5_1); NCCL_IB_GID_INDEX for RoCE
  #   FI_PROVIDER=efa     on AWS, with the plugin aws-ofi-nccl
  ulimit -Sn "$(ulimit -Hn)"
}

sweep() {  # FOLDER PATTERN: delete what jobs of this user have left there when they were killed: nobody has it locked any more
  find "$1" -maxdepth 1 -user "$UID" -name "$2" -mmin +1 -exec flock --nonblock {} rm -rf {} \; || true
}

local_folder() {  # for compiled kernels, which on a network file system are slow or stale, and for sockets and other small files
  # the path of a socket has at most 107 bytes, and Ray appends 70; a TMPDIR of the login node may not exist here
  local parent=${TMPDIR:-/tmp} lock
  { [ "${#parent}" -le 14 ] && [ -w "$parent" ]; } || parent=/tmp
  sweep "$parent" 'dapo_mcore-node-????????'
  sweep /dev/shm 'dapo_mcore-*' # weights on their way to servers
  folder=$(mktemp -d "$parent/dapo_mcore-node-XXXXXXXX")
  exec {lock}<"$folder" && flock --shared "$lock" # torchrun inherits it
  trap 'rm -rf "$folder"' EXIT
  export TMPDIR=$folder TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$folder/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$folder/inductor}
}

case $action in
  check)
    "${config[@]}" --processes "$((NODES * RANKS_PER_NODE))" >/dev/null
    echo "run_dir=$("${config[@]}" --run-dir)"
    ;;
  report) python -m dapo_mcore.process.failures "$@" ;;
  show) "${config[@]}" --only-values --processes "$((NODES * RANKS_PER_NODE))" ;;
  doctor | train)
    logs=RUN/logs/$ATTEMPT/NODE
    [ -n "${DRY_RUN:-}" ] || logs=$("${config[@]}" --run-dir | tail -n 1)/logs/$ATTEMPT/$SLURMD_NODENAME
    # static: ranks are in the order of Slurm's nodes, which is that of its topology
    command=(torchrun --nnodes "$NODES" --nproc-per-node "$RANKS_PER_NODE" --node-rank "${SLURM_NODEID:-NODE}"
      --master-addr "$FIRST_NODE" --master-port "$PORT" --rdzv-conf "timeout=$JOIN_SECONDS"
      --rdzv-id "$ATTEMPT")
    if [ "$action" = doctor ]; then
      command+=(--max-restarts 0 -m dapo_mcore.cli doctor "$@" --json "${logs%/*}/doctor.json")
    else
      command+=(--max-restarts "$MAX_RESTARTS" --shutdown-timeout "$SAVE_SECONDS" --log-dir "$logs" --tee 3 --local-ranks-filter 0 -m dapo_mcore.train "$@")
    fi
    if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "${command[@]}" && echo && exit; fi
    peer=$([ "$SLURM_NODEID" != 0 ] && echo "$FIRST_NODE" || echo "$SECOND_NODE")
    interface=$([ -z "$peer" ] || python -m dapo_mcore.process.route "$peer")
    environment
    local_folder
    mkdir -p "$logs"
    [ "$action" = train ] || { "${command[@]}" 2>"$logs/doctor.log" && exit; exit 1; }
    # scancel signals every process of the job. Without this shell Slurm would kill the ranks while they save
    trap : TERM
    status=0
    { "${command[@]}" || status=$?; } 2> >(trap '' TERM && exec tee "$logs/torchrun.log" >&2)
    wait $! || true # for tee
    [ "$status" -eq 0 ] || echo "torchrun ended with status $status" >>"$logs/torchrun.log"
    exit "$status"
    ;;
esac
