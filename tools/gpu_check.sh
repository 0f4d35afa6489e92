#!/usr/bin/env bash
# Checks a GPU node in parts, the most valuable first. Run it from a checkout, installed or not:
#
#   tools/gpu_check.sh [MINUTES [FOLDER [PART…]]]
#
# MINUTES  time limit in all (30); each part has a limit of its own, too.
# FOLDER   gets gpu_check.jsonl, one record per part as soon as it ends, and a folder per part with its log
#          (runs/gpu_check). A second call adds to it.
# PART     kernel-tests gpu-tests head actors fp8 fp8-tensor fp8-disk cuda-graphs cuda-graphs-released (all of them).
#
# A part that lacks a GPU, SGLang or another package says so and is not a failure. Exit status 1: a part failed or ran
# out of time. Environment:
#   PYTHON         the interpreter (python3)
#   SGLANG_PYTHON  the interpreter that has SGLang, if it is another one
#   WHEELS         a folder of wheels that the interpreter lacks; they are unpacked for this call only
#   GPU_CHECK_TINY 1: tiny sizes, as a rehearsal on a CPU
set -euo pipefail
if [[ ${1:-} == -* ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd) python=${PYTHON:-python3} site=
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  for wheel in "$WHEELS"/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done
  rm -rf "$site/tests"  # some wheels hold a package of that name, which would hide ours
fi
export PYTHONPATH=$root${site:+:$site}${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Transformer Engine loads the system's cuDNN before the one that PyTorch brings, and attention fails if they differ.
if cudnn=$("$python" -c 'import nvidia.cudnn; print(nvidia.cudnn.__path__[0])' 2>/dev/null) && command -v nvidia-smi >/dev/null; then
  export LD_LIBRARY_PATH=$cudnn/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  LD_PRELOAD=$(printf '%s:' "$cudnn"/lib/libcudnn*.so.9)${LD_PRELOAD:-}
  export LD_PRELOAD
fi
"$python" -m tools.gpu_check "$@"
