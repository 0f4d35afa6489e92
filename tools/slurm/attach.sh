#!/usr/bin/env bash
# A shell on a node of a running job, beside its ranks: attach.sh JOB [NODE]
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: attach.sh JOB [NODE]" >&2; exit 2; }
exec srun --jobid="$1" --overlap --ntasks=1 --nodes=1 ${2:+"--nodelist=$2"} --pty bash
