#!/usr/bin/env bash
# Makes a virtual environment in DIR that runs SGLang's real HTTP server on a CPU, in about two minutes and 1.1 GB:
#
#   tools/sglang_cpu/setup.sh DIR [PIP OPTION…]
#
# PyPI's torch for Linux is the CUDA build; for the CPU build append --extra-index-url https://download.pytorch.org/whl/cpu
#
# Real: the server, its scheduler, tokenizer and model code, torch, weight updates. Hollow: sgl_kernel, triton,
# torchvision, soundfile and IPython, which SGLang imports everywhere but does not call for a dense text model on a CPU.
# Their wheels need CUDA or bring gigabytes, so hollow.py stands in for them. SGLang's own requirements are CUDA packages
# too, hence --no-deps and requirements.txt, which pins every package that the server does import.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
dir=$1 here=$(cd "$(dirname "$0")" && pwd)
shift
"${PYTHON:-python3}" -m venv "$dir"
python=$dir/bin/python
"$python" -m pip install --quiet --quiet --disable-pip-version-check --no-deps --no-compile -r "$here/requirements.txt" "$@"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$here/hollow.py" "$site/sglang_cpu_hollow.py"
echo "import sglang_cpu_hollow" >"$site/sglang_cpu_hollow.pth"  # at every start of this environment's interpreter
# The check also leaves the bytecode behind, without which each start of a server takes twice as long.
unset PYTHONDONTWRITEBYTECODE
"$python" -P -W ignore -c '
from sglang.srt.entrypoints import http_server
from sglang.srt.models import qwen2
from sglang.version import __version__
print("SGLang", __version__)'
