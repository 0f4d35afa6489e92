#!/usr/bin/env bash
# On a machine with a GPU: the tests that need one, then the kernel benchmark with its tables, and its plot.
#   tools/gpu_bench.sh [WHEELS [RESULTS [PYTEST_ARGUMENT…]]]
# WHEELS: a folder of wheels for what the machine lacks (opponents, rich, …), installed aside and only for this run; "" for
#   none. RESULTS: where the JSON goes (kernels/results). More arguments go to the benchmark, as in -k "32B-TP1".
# A long benchmark can be run in parts: the same RESULTS and commit continue the file. Where .git is not at hand, set
# DAPO_MCORE_BENCH_COMMIT.
set -uo pipefail
cd "$(dirname "$0")/.."
wheels=${1:-} results=${2:-kernels/results}
shift $(( $# < 2 ? $# : 2 ))
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "$0: no GPU here" >&2; exit 1; }

if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -r "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --target "$site" "$wheels"/*.whl || exit 1
  rm -rf "$site/tests"  # some wheels hold a package of that name, which would hide ours
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

failed=0
"$python" -m pytest -q tests/kernels -m "not bench" || failed=1
"$python" -m pytest -q tests -m "gpu and not bench" --ignore tests/kernels
tests=$?  # 5: there are none
[ $tests -eq 0 ] || [ $tests -eq 5 ] || failed=1
DAPO_MCORE_BENCH_RESULTS=$results "$python" -m pytest -q -m bench tests/kernels "$@" || failed=1
"$python" -m dapo_mcore.cli plot --bench "$results"/*.json
exit $failed
