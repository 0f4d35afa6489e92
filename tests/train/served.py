"""Start runs on servers. A fake server's response repeats its prompt, and a reward function decides whether it is right."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.rollout.sglang.fake_server import fake_python
from tests.train.runs import QUICKSTART, SMALL, TRAIN, python, torchrun

# answers are right and wrong in turn, so every group varies. After `WRONG_FROM` responses all are wrong
REWARD = """
import itertools, os
_asked = itertools.count()

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    number = next(_asked)
    return float(number % 2 if number < int(os.environ["WRONG_FROM"]) else 0)
"""
SERVED = [
    "warm_start=null",
    "eval.sets={}",
    "rollout.engine=sglang",
    "rollout.async_steps=1",
    "rollout.sglang.device=cpu",
    "algo.tis.mode=truncate",
    "reward.workers=1",
    "sampling.style=filter",
    "sampling.train_batch_prompts=4",
    "sampling.gen_batch_prompts=6",
    "sampling.max_staleness=2",
    "sampling.carry_surplus=true",
    "sampling.on_exhausted=error",
    "sampling.max_gen_batches=2",
    "sampling.max_in_flight_groups=3",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "checkpoint.export_at_end=false",
    "observe.samples_per_step=1000",
]


def fake_beside_reward(folder: Path, reward: str = REWARD, **manner: Any) -> Path:
    """Return the interpreter of a fake server, beside the file of the reward function."""
    (folder / "reward.py").write_text(reward)
    return fake_python(folder, **{"tokens_per_s": 200, **manner})


def run_served(
    task: Path,
    fake: Path,
    name: str,
    *overrides: str,
    processes: int = 1,
    wrong_from: int = 10**9,
    server: Path | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Train on a server that `server` starts (default: `fake`), with the reward function beside `fake`."""
    places = [
        f"reward.function={fake.parent / 'reward.py'}:compute_score",
        f"rollout.sglang.python={server or fake}",
        f"parallel.tensor_parallel={processes}",
    ]
    variables |= {"WRONG_FROM": str(wrong_from), **({"FAKE_DEAF": "1"} if processes > 1 else {})}
    arguments = [QUICKSTART, *SMALL, *SERVED, *places, f"name={name}", *overrides]
    return python(task, *torchrun(processes), *TRAIN, *arguments, **variables)


def trained(task: Path, name: str) -> dict[int, dict[str, int]]:
    """Return {step: {uid of a group trained on: version of its weights}}."""
    files = sorted((task / "runs" / name / "samples").glob("*.jsonl"))
    rows = {int(path.stem[5:]): map(json.loads, path.read_text().splitlines()) for path in files}
    return {step: {row["uid"]: row["weight_version"] for row in some} for step, some in rows.items()}
