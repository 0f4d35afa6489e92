#!/usr/bin/env bash
# On a machine with a GPU and SGLang: six DAPO steps with a server on the trainer's own GPU, in bf16 by two ways of sync and
# with block-FP8 rollouts. Prints what turns and sync took and how far server and actor disagree, and writes that as JSON.
#   tools/gpu_colocated.sh [RESULTS [OVERRIDE…]]       RESULTS: folder of the JSON (kernels/results)
# PYTHON: the trainer's interpreter; SGLANG_PYTHON: the one that has SGLang. The model is random, in Qwen2.5-0.5B's shapes, or
# what SHAPES (JSON, keys of config.json) says. DEVICE=cpu rehearses it without a GPU, in fp32.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-kernels/results}
shift $(( $# < 1 ? $# : 1 ))
python=${PYTHON:-python3} device=${DEVICE:-cuda}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" examples/arithmetic.py --out "$work/arithmetic" >"$work/log"
"$python" - "$work/arithmetic/model/config.json" <<'PY'
import json, os, pathlib, sys

path = pathlib.Path(sys.argv[1])
qwen = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2)
shapes = json.loads(os.environ.get("SHAPES") or "null") or qwen | {"max_position_embeddings": 4096}
path.write_text(json.dumps({**json.loads(path.read_text()), **shapes}))
PY

run() { # NAME OVERRIDE…
  "$python" -m dapo_mcore.train examples/quickstart.yaml name="$1" output_dir="$work/runs" parallel.tensor_parallel=1 \
    model.path="$work/arithmetic/model" data.files="[$work/arithmetic/train.jsonl]" warm_start=null eval.sets={} \
    num_rollout_steps=6 sampling.style=none rollout.max_response_tokens=512 optimizer.lr=1e-6 checkpoint.export_at_end=false \
    rollout.engine=sglang rollout.sglang.colocated=true rollout.sglang.device="$device" \
    ${SGLANG_PYTHON:+rollout.sglang.python="$SGLANG_PYTHON"} "${@:2}" 1>&2 || failed+=("$1")
}
failed=()
if [ "$device" = cuda ]; then
  gpu='{mem-fraction-static: 0.6, attention-backend: fa3, sampling-backend: pytorch}'
  run bf16 model.dtype=bf16 "rollout.sglang.server_args=$gpu" "$@"
  run bf16-tensor model.dtype=bf16 rollout.sglang.sync=tensor "rollout.sglang.server_args=$gpu" "$@"
  run fp8 model.dtype=bf16 rollout.sglang.quantize=fp8 "rollout.sglang.server_args=$gpu" "$@"
else
  run fp32 model.dtype=fp32 "$@"
fi

"$python" - "$work/runs" "$results" <<'PY'
import json, pathlib, platform, statistics, subprocess, sys

import torch

runs, results = map(pathlib.Path, sys.argv[1:])
wanted = ("sync/", "mismatch/logprob", "mismatch/k3", "time/", "memory/")
table = {}
for folder in sorted(runs.iterdir()):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] >= 2]  # the first one warms up
    names = [name for name in rows[0] if name.startswith(wanted)] if rows else []
    table[folder.name] = {name: statistics.median(row[name] for row in rows) for name in names}
machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
about = {"machine": machine, "torch": torch.__version__, "commit": commit, "what": "medians over steps 2 to 6"}
results.mkdir(parents=True, exist_ok=True)
target = results / f"colocated-{machine.replace(' ', '-')}.json"
target.write_text(json.dumps({**about, "runs": table}, indent=1))
for name in sorted({name for row in table.values() for name in row}):
    print(f"{name:32}", *(f"{run} {row.get(name, float('nan')):.4g}" for run, row in table.items()), sep="  ")
print(target)
PY
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
