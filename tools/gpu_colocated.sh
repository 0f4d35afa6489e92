#!/usr/bin/env bash
# On a machine with a GPU and SGLang: a few DAPO steps with a server on the trainer's own GPU, once for each way that is named.
#   tools/gpu_colocated.sh RESULTS [WAY…]      RESULTS: the JSON-lines file that gets a row as soon as a way is done
# Ways, in this order where none is named: ipc (the test of CUDA IPC), fp8-disk and fp8-tensor (block-FP8 rollouts by two ways
# of sync), graphs (bf16 with CUDA graphs); and graphs-released (their memory is released, too), bf16-disk, bf16-tensor. One is
# ok when all its steps were done and no server was restarted or left out. The exit status is 1 when one is not.
# Environment:
#   PYTHON         the trainer's interpreter
#   SGLANG_PYTHON  the one that has SGLang; or SGLANG_SITE, a folder of unpacked wheels for the trainer's
#   STEPS (3), LIMIT_S (240: a way's time limit), OVERRIDES (more settings), SHAPES (JSON, keys of config.json; else
#   Qwen2.5-0.5B's; the weights are random), DEVICE (cpu rehearses the ways cpu-disk and cpu-tensor in fp32)
#   PARALLEL       1: all ways at once, where minutes count; a large GPU holds the small models, but no time is a measurement
set -euo pipefail
results=$(realpath -m "${1:?RESULTS}")
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} device=${DEVICE:-cuda}
[ $# -gt 0 ] || set -- ipc fp8-disk fp8-tensor graphs
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$(dirname "$results")"

if [ -n "${SGLANG_SITE:-}" ]; then
  SGLANG_PYTHON=$work/python  # a libcudnn that the trainer preloads is not for the server, and CUDA_HOME is for its nvcc
  printf '#!/bin/sh\nunset LD_PRELOAD\nexport PYTHONPATH=%q CUDA_HOME=%q\nexec %q "$@"\n' \
    "$SGLANG_SITE" "${CUDA_HOME:-/usr/local/cuda}" "$(command -v "$python")" >"$SGLANG_PYTHON"
  chmod +x "$SGLANG_PYTHON"
fi
"$python" examples/arithmetic.py --out "$work/arithmetic" >"$work/log"
"$python" - "$work/arithmetic/model/config.json" <<'PY'
import json, os, pathlib, sys

path = pathlib.Path(sys.argv[1])
qwen = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2)
shapes = json.loads(os.environ.get("SHAPES") or "null") or qwen | {"max_position_embeddings": 4096}
path.write_text(json.dumps({**json.loads(path.read_text()), **shapes}))
PY

train() { # WAY OVERRIDE…
  timeout -k 10 "${LIMIT_S:-240}" "$python" -m dapo_mcore.train examples/quickstart.yaml name="$1" output_dir="$work/runs" \
    parallel.tensor_parallel=1 model.path="$work/arithmetic/model" data.files="[$work/arithmetic/train.jsonl]" \
    warm_start=null eval.sets={} num_rollout_steps="${STEPS:-3}" rollout.max_response_tokens=512 optimizer.lr=1e-6 \
    sampling.style=none sampling.gen_batch_prompts=8 sampling.train_batch_prompts=8 checkpoint.export_at_end=false observe.plot_at_end=false \
    rollout.engine=sglang rollout.sglang.colocated=true rollout.sglang.device="$device" \
    ${SGLANG_PYTHON:+rollout.sglang.python="$SGLANG_PYTHON"} "${@:2}" ${OVERRIDES:-} >"$work/$1.log" 2>&1
}

gpu() { # SERVER_ARGUMENTS
  echo "rollout.sglang.server_args={mem-fraction-static: 0.5, max-total-tokens: 131072, attention-backend: fa3," \
    "sampling-backend: pytorch, $1}"
}

row() { # WAY STATUS SECONDS
  "$python" - "$work" "$results" "${STEPS:-3}" "$@" <<'PY'
import json, os, pathlib, platform, statistics, subprocess, sys

import torch

work, results = map(pathlib.Path, sys.argv[1:3])
steps, way, status, seconds = int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
folder = work / "runs" / way
metrics, log = folder / "metrics.jsonl", folder / "servers/server-0.log"
rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
lost = {key: sum(row.get(f"rollout/{key}", 0) for row in rows) for key in ("server_restarts", "servers_excluded")}
ok = status == 0 and (way == "ipc" or len(rows) == steps and not any(lost.values()))
wanted = ("sync/", "mismatch/logprob", "mismatch/k3", "time/", "memory/")
later = [row for row in rows if row["step"] >= 2]  # the first step warms up
medians = {name: statistics.median(row[name] for row in later) for name in (later or [{}])[0] if name.startswith(wanted)}
head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
commit = os.environ.get("DAPO_MCORE_BENCH_COMMIT") or head  # a copied .git may be of another commit
machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
about = {"machine": machine, "torch": torch.__version__, "commit": commit, "parallel": os.environ.get("PARALLEL") == "1"}
row = {"run": way, "ok": ok, "status": status, "seconds": seconds, "steps": len(rows), **lost, **about, **medians}
if not ok:
    tails = {"said": work / f"{way}.log", "server_said": log}
    row |= {key: path.read_text(errors="replace").splitlines()[-60:] for key, path in tails.items() if path.exists()}
with results.open("a") as file:
    file.write(json.dumps(row) + "\n")
print(f"{way}: {'ok' if ok else 'FAILED'} after {seconds} s,", ", ".join(f"{key} {value:g}" for key, value in lost.items()))
sys.exit(not ok)
PY
}

way() { # WAY
  local way=$1 start=$SECONDS status=0
  case $way in
    ipc) "$python" -m pytest -q -m gpu tests/rollout/sglang/sync/test_tensor.py >"$work/ipc.log" 2>&1 || status=$? ;;
    fp8-*) train "$way" model.dtype=bf16 rollout.sglang.sync="${way#*-}" rollout.sglang.quantize=fp8 \
      "$(gpu 'disable-cuda-graph: true')" || status=$? ;;
    bf16-*) train "$way" model.dtype=bf16 rollout.sglang.sync="${way#*-}" "$(gpu 'disable-cuda-graph: true')" || status=$? ;;
    graphs*) [ "$way" = graphs ] || export SGLANG_MEMORY_SAVER_CUDA_GRAPH=1
      train "$way" model.dtype=bf16 rollout.sglang.sync=tensor \
        "$(gpu 'cuda-graph-backend-prefill: disabled, cuda-graph-max-bs-decode: 128')" || status=$? ;;
    cpu-*) train "$way" model.dtype=fp32 rollout.sglang.sync="${way#*-}" || status=$? ;;
    *) echo "$0: no way $way" >&2; return 2 ;;
  esac
  row "$way" "$status" $((SECONDS - start)) || status=1
  rm -rf "$work/runs/$way"  # with its checkpoint
  return "$status"
}

failed=0 jobs=()
for name; do
  way "$name" &
  jobs+=($!)
  if [ "${PARALLEL:-}" != 1 ]; then
    wait $! || failed=1
    jobs=()
  fi
done
for job in "${jobs[@]}"; do wait "$job" || failed=1; done
exit $failed
