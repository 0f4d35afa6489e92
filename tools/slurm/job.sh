#!/usr/bin/env bash
# A training job on the nodes of a Slurm allocation: checked, started, told to stop in time, and started again.
#
#   job.sh DEFAULT.yaml [--dry-run] [--nodes=N] [CONFIG.yaml] [a.b=c …]     (tools/*.slurm give DEFAULT.yaml)
#
# Read from the environment (sbatch passes it on):
#   RANKS_PER_NODE   processes per node, one per GPU (default: 8)
#   GPUS_PER_NODE    GPUs of each node; those after the ranks' are for servers (default: RANKS_PER_NODE)
#   VENV             virtual environment on every node (default: .venv of the checkout)
#   CONTAINER        image for pyxis/enroot in place of VENV, with the package, python and torchrun installed
#   MOUNTS           its further mounts, as A:B,C:D; the checkout and the folder of the job are mounted at their paths
#   MAX_RESTARTS     how often torchrun starts ranks again after a failure or a hang (default: 0). They go on from the newest
#                    checkpoint; the third start from the same one ends the job
#   SAVE_SECONDS     how long ranks may take to save once they are told to end (default: 600)
#   DOCTOR           0: start the ranks without examining the nodes (default: 1; half a minute against a run of days)
#   JOIN_SECONDS     how long nodes wait for each other at the start (default: 600)
#
# How it ends. Before the job's time is over, Slurm sends USR1 to this shell alone. This shell makes RUN/stop; the run sees the
# file in any phase, saves, writes RUN/requeue and ends with 0; this shell puts the job back into the queue. Without a new
# rollout step since the last start it does not, as a job that is too short would be started for ever. Nor does it if a person
# has made RUN/stop. A job that hung goes back into the queue as well (the watchdog beside the ranks ends them and writes
# RUN/requeue), unless no checkpoint was written since its start. After any other failure it does not.
set -euo pipefail
stopping=''
trap 'stopping=1' USR1 # first of all: without a handler the signal would end this shell
root=$(cd "$(dirname "$0")/../.." && pwd)

refuse() { echo "$1" >&2; exit 2; }

config='' dry_run='' overrides=()
for argument in "${@:2}"; do
  case $argument in
    -h | --help) exec sed -n '2,/^set /{ s/^# \{0,1\}//p }' "$0" ;;
    --dry-run) dry_run=1 ;;
    --nodes=*) NODES=${argument#*=} ;;
    *)
      if [[ $argument =~ ^[A-Za-z_][A-Za-z_0-9.]*= ]]; then overrides+=("$argument") && continue; fi
      [[ $argument =~ \.ya?ml$ ]] || refuse "$argument is none of --dry-run, --nodes=N, CONFIG.yaml and a.b=c"
      [ -z "$config" ] || refuse "a job has one configuration, but $config and $argument are two; name one of them"
      config=$argument
      ;;
  esac
done
config=${config:-$1}

[ -n "$dry_run" ] || [ -n "${SLURM_JOB_ID:-}" ] || refuse "this is no Slurm job: start it with sbatch, or add --dry-run"
[ -n "$dry_run" ] || NODES=$SLURM_JOB_NUM_NODES
: "${NODES:=1}" "${RANKS_PER_NODE:=8}" "${SAVE_SECONDS:=600}" "${JOIN_SECONDS:=600}" "${MAX_RESTARTS:=0}" "${DOCTOR:=1}" "${CONTAINER:=}" "${MOUNTS:=}"
: "${GPUS_PER_NODE:=$RANKS_PER_NODE}"
for name in NODES RANKS_PER_NODE GPUS_PER_NODE SAVE_SECONDS JOIN_SECONDS; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || refuse "$name is ${!name}; it must be a whole number of at least 1"
done
[ "$GPUS_PER_NODE" -ge "$RANKS_PER_NODE" ] ||
  refuse "GPUS_PER_NODE $GPUS_PER_NODE is less than RANKS_PER_NODE $RANKS_PER_NODE, but each rank needs a GPU; raise it, or lower RANKS_PER_NODE"
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || refuse "MAX_RESTARTS is $MAX_RESTARTS; it must be a whole number of at least 0"
[[ $DOCTOR =~ ^[01]$ ]] || refuse "DOCTOR is $DOCTOR; it must be 1 (examine the nodes) or 0"
[ -z "$MOUNTS" ] || [ -n "$CONTAINER" ] || refuse "MOUNTS is $MOUNTS, but only a container has mounts; set CONTAINER, or unset MOUNTS"
[[ ! $CONTAINER =~ ^[./] ]] || [ -e "$CONTAINER" ] || refuse "CONTAINER is $CONTAINER, which does not exist; correct the path"
export RANKS_PER_NODE NODES SAVE_SECONDS JOIN_SECONDS MAX_RESTARTS
export VENV=${VENV:-$root/.venv} ATTEMPT=${SLURM_JOB_ID:-JOB}.${SLURM_RESTART_COUNT:-0}
mounts=$root:$root container=()
[ "$PWD" = "$root" ] || mounts+=,$PWD:$PWD
[ -z "$CONTAINER" ] || container=("--container-image=$CONTAINER" "--container-mounts=$mounts${MOUNTS:+,$MOUNTS}" "--container-workdir=$PWD")

address() {  # the name or number by which Slurm itself reaches this node of the job
  local name
  name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n "$1p")
  [ -z "$name" ] || scontrol show node "$name" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

free_port() {  # this shell is on the first node; below the ports that systems give to clients, and another one for each job
  local port=$((20000 + SLURM_JOB_ID % 10000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  echo "$port"
}

# a step of a job with --exclusive gets GPUs only if it asks for them
gpus=("--gres=gpu:$GPUS_PER_NODE")
[ -n "$dry_run" ] || [[ $(scontrol show node "$SLURMD_NODENAME") == *Gres=gpu* ]] || gpus=()
node=(bash "$root/tools/slurm/node.sh")
check=(srun --nodes=1 --ntasks=1 "${container[@]}" "${node[@]}" check "$config" "${overrides[@]}")
# where srun was killed, the ranks' step still has all that the job has; --overlap does not wait for it
report=(timeout 60 srun --nodes=1 --ntasks=1 --overlap "${container[@]}" "${node[@]}" report)
# Slurm sees one task per node and would bind it to one core, with all ranks, servers and reward workers of the node
everywhere=(srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none "${gpus[@]}")
train=("${everywhere[@]}" "${container[@]}" "${node[@]}" train "$config" "${overrides[@]}")
doctor=("${everywhere[@]}" --time=15 "${container[@]}" "${node[@]}" doctor "$config" "${overrides[@]}")

if [ -n "$dry_run" ]; then
  export FIRST_NODE=FIRST_NODE PORT=PORT
  echo "# $NODES nodes × $RANKS_PER_NODE ranks; on the first node, to check the configuration:"
  printf '%q ' "${check[@]}" && echo
  [ "$DOCTOR" = 0 ] || { echo "# on every node, to examine them:" && printf '%q ' "${doctor[@]}" && echo; }
  echo "# on every node:"
  printf '%q ' "${train[@]}" && echo
  DRY_RUN=1 "${node[@]}" train "$config" "${overrides[@]}"
  echo "# the configuration:"
  exec "${node[@]}" show "$config" "${overrides[@]}"
fi

echo "attempt $ATTEMPT on $SLURM_JOB_NODELIST"
run=$("${check[@]}" | sed -n 's/^run_dir=//p' | tail -n 1)
FIRST_NODE=$(address 1) SECOND_NODE=$(address 2) PORT=$(free_port)
export FIRST_NODE SECOND_NODE PORT
if [ -z "$run" ] || [ -z "$FIRST_NODE" ]; then
  echo "no folder of the run ('$run'), or no address of the first node ('$FIRST_NODE')" >&2
  exit 1
fi
rm -f "$run/stop" "$run/requeue"
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$run/requeued"

# Only a verdict ends the job. Where doctor itself fails, the ranks may still run, or say better why they cannot
if [ "$DOCTOR" != 0 ] && ! "${doctor[@]}"; then
  logs=$run/logs/$ATTEMPT
  if grep -q '"can_run": false' "$logs/doctor.json" 2>/dev/null; then
    echo "the job ends before its ranks start: see ✗ above, or $logs/doctor.json; DOCTOR=0 starts it all the same" >&2
    exit 1
  fi
  echo "dapo-mcore doctor itself has failed, and the job goes on; $logs/*/doctor.log says why" >&2
fi
PORT=$(free_port) # another job may have taken it since

newest() {  # the newest checkpoint of the run
  { find "$run/checkpoints" -maxdepth 1 -regex '.*/step_[0-9]+' 2>/dev/null || true; } | sort -V | tail -n 1
}

again() {
  # one task of an array may have the id of the array, and Slurm would requeue all of them
  scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
}

before=$(newest)
"${train[@]}" &
step=$!
while kill -0 "$step" 2>/dev/null; do
  # again and again, as a run that is just starting removes the file of an earlier one
  if [ -n "$stopping" ]; then { mkdir -p "$run" && touch "$run/stop"; } || true; sleep 2; else wait "$step" || true; fi
done
status=0
wait "$step" || status=$?
person=''
[ -n "$stopping" ] || [ ! -e "$run/stop" ] || person=1
rm -f "$run/stop"

if [ "$status" -ne 0 ]; then
  "${report[@]}" "$run/logs/$ATTEMPT" >&2 || true
  echo "the job has failed with status $status; logs of all ranks: $run/logs/$ATTEMPT" >&2
  [ -e "$run/requeue" ] || exit "$status"
  [ -z "$person" ] || { echo "it hung while $run/stop was there; submit the job again to go on" >&2; exit "$status"; }
  if [ "$(newest)" = "$before" ]; then
    echo "it hung without a new checkpoint since its start, so it is not started again" >&2
    exit "$status"
  fi
  echo "it hung, and starts again from $(newest)" >&2
  again
  exit
fi
[ -e "$run/requeue" ] || exit 0
[ -n "$stopping" ] || { echo "stopped by $run/stop; submit the job again to go on"; exit 0; }
if cmp -s "$run/requeue" "$run/requeued"; then
  echo "no rollout step was finished since the last start, so the job is not started again; give it more --time" >&2
  exit 1
fi
mv "$run/requeue" "$run/requeued"
again
