#!/usr/bin/env bash
# A shell on a node of a running job, beside its ranks: attach.sh JOB [NODE]. With CONTAINER=1 it is in the container of the ranks.
set -euo pipefail
usage='usage: attach.sh JOB [NODE]; CONTAINER=1 enters the container of the ranks'
case ${1:-} in
  '') echo "$usage" >&2 && exit 2 ;;
  -h | --help) echo "$usage" && exit ;;
esac
inside() {  # runs on the node: enter where the node's task of an earlier step is
  exec enroot exec "$(scontrol listpids "$SLURM_JOB_ID" "$SLURMD_NODENAME" |
    awk -v own="$SLURM_STEP_ID" '$3 ~ /^[0-9]+$/ && $3 != own && $4 == 0 { print $1; exit }')" bash
}
shell=(bash)
[ -z "${CONTAINER:-}" ] || shell+=(-c "$(declare -f inside); inside")
exec srun --jobid="$1" --overlap --ntasks=1 --nodes=1 ${2:+"--nodelist=$2"} --pty "${shell[@]}"
