"""Scripts written in slime's style."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.read.slime import read_slime

SCRIPT = """#!/bin/bash
pkill -9 sglang
HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${HERE}/models/tiny.sh"
CARDS=${CARDS:-$(nvidia-smi -L | wc -l)}
ROLLOUT=(
   --prompt-data /data/train.jsonl   # one a line
   --rollout-batch-size 64
   # --n-samples-per-prompt 4
   --n-samples-per-prompt 16
   --apply-chat-template
   --apply-chat-template-kwargs '{"enable_thinking": false}'
   --eval-prompt-data aime /data/aime.jsonl math /data/math.jsonl
   --rollout-stop-token-ids 7
   --eps-clip-high=0.28
   --kl-loss-coef -0.5
)
ray job submit --address=http://127.0.0.1:8265 -- python3 train_async.py \\
   --actor-num-gpus-per-node ${CARDS} --colocate --no-offload-train \\
   ${MODEL_ARGS[@]} ${ROLLOUT[@]} --sglang-cuda-graph-bs 1 2 $(seq 4 4 8) ${EXTRA}
"""


def test_a_script(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.sh").write_text("MODEL_ARGS=(\n  --num-layers 2\n  --swiglu\n)")
    (tmp_path / "run.sh").write_text(SCRIPT)
    run = read_slime(tmp_path / "run.sh")
    assert (run.dialect, run.entry) == ("slime", "train_async.py")
    found = {setting.key: setting.value for setting in run.settings}
    assert found == {
        "actor-num-gpus-per-node": "$(nvidia-smi -L | wc -l)",
        "colocate": True,
        "offload-train": False,
        "num-layers": 2,
        "swiglu": True,
        "prompt-data": "/data/train.jsonl",
        "rollout-batch-size": 64,
        "n-samples-per-prompt": 16,
        "apply-chat-template": True,
        "apply-chat-template-kwargs": {"enable_thinking": False},
        "eval-prompt-data": ["aime", "/data/aime.jsonl", "math", "/data/math.jsonl"],
        "rollout-stop-token-ids": [7],
        "eps-clip-high": 0.28,
        "kl-loss-coef": -0.5,
        "sglang-cuda-graph-bs": [1, 2, 4, 8],
    }
    assert run.notes == ("line 20: ${EXTRA} may hold further flags; write them into a copy of the script",)
    by_key = run.by_key()
    assert by_key["rollout-batch-size"].where == "run.sh line 8"
    assert by_key["actor-num-gpus-per-node"].unknown == ("$(nvidia-smi -L | wc -l)",)


def test_other_scripts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("python3 -m verl.trainer.main_ppo a.b=1")
    with pytest.raises(
        ConfigError, match=r"no training command in this script; give a script that starts slime's trainer"
    ):
        read_slime(tmp_path / "run.sh")


def test_a_json_value_ends_where_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "run.sh"
    file.write_text('KEYS=\'{"image": "images"}\'\npython3 train.py --multimodal-keys "$KEYS" ${MORE} --lr 1e-6\n')
    run = read_slime(file)
    assert {setting.key: setting.value for setting in run.settings} == {
        "multimodal-keys": {"image": "images"},
        "lr": 1e-6,
    }
    assert any("may hold further flags" in note for note in run.notes)


def test_the_file_of_further_arguments_replaces_flags(tmp_path: Path) -> None:
    """It is named from the top of slime's repository."""
    (tmp_path / "examples/mis").mkdir(parents=True)
    (tmp_path / "examples/mis/mis.yaml").write_text("use_tis: true\ntis_level: token\neps_clip: 1.0e-4\n")
    script = tmp_path / "examples/mis/run.sh"
    script.write_text("python3 train.py --eps-clip 0.2 --custom-config-path examples/mis/mis.yaml\n")
    found = {setting.key: (setting.value, setting.where) for setting in read_slime(script).settings}
    assert found == {
        "eps-clip": (1e-4, "mis.yaml"), "use-tis": (True, "mis.yaml"), "tis-level": ("token", "mis.yaml"),
    }  # fmt: skip
    (tmp_path / "examples/mis/mis.yaml").unlink()
    run = read_slime(script)
    assert "custom-config-path" in run.by_key() and "not beside the script" in run.notes[0]
