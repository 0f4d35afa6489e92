"""A run that is resumed with changed data: answers that were carried over stay with their own prompts, or are dropped."""

from __future__ import annotations

import json
from pathlib import Path

from tests.train.runs import QUICKSTART, python

# about half of the answers are right, so groups vary and some are carried to the next step
REWARD = """
def by_length(data_source, solution_str, ground_truth, extra_info=None):
    return float(len(solution_str) % 2)
"""
SETTINGS = [
    "name=r",
    "parallel.tensor_parallel=1",
    "data.files=[rows.jsonl]",
    "data.max_prompt_tokens=16",
    "reward.function=by_length.py:by_length",
    "reward.workers=0",
    "warm_start=null",
    "optimizer.warmup_updates=1",
    "eval.sets={}",
    "sampling.style=filter",
    "sampling.train_batch_prompts=2",
    "sampling.gen_batch_prompts=8",
    "sampling.carry_surplus=true",
    "sampling.max_staleness=1",
    "batch.mini_batch_prompts=2",
    "rollout.group_size=4",
    "rollout.max_response_tokens=12",
    "reward.overlong.cache=4",
    "checkpoint.every=1",
    "checkpoint.export_at_end=false",
    "observe.samples_per_step=100",
    "observe.tensorboard=false",
    "observe.plot_at_end=false",
]
# one process for all runs: imports cost more than two steps
DRIVER = """
import json, shutil, sys
from pathlib import Path
from dapo_mcore.train.__main__ import main
arguments, cases = json.load(sys.stdin)
assert main([*arguments, "num_rollout_steps=1"]) == 0
shutil.copytree("runs/r", "saved")
for name, (rows, more) in cases.items():
    Path("rows.jsonl").write_text(rows)
    shutil.rmtree("runs/r")
    shutil.copytree("saved", "runs/r")
    print("CASE", name)
    assert main([*arguments, "num_rollout_steps=2", *more]) == 0
    shutil.copytree("runs/r/samples", name)
"""


def test_carried_answers_follow_their_prompts_through_changed_data(task: Path):
    rows = [json.dumps({"prompt": f"{n}+{n + 1}=", "answer": str(2 * n + 1)}) + "\n" for n in range(10, 22)]
    (task / "by_length.py").write_text(REWARD)
    (task / "rows.jsonl").write_text("".join(rows))
    cases = {
        "same": ("".join(rows), []),
        "moved": ("".join(['{"prompt": "1+1=", "answer": "2"}\n', *rows[::-1]]), []),
        "reworded": ("".join(rows), ["data.prompt_template=0+{prompt}"]),
    }
    done = python(task, "-c", DRIVER, stdin=json.dumps([[QUICKSTART, *SETTINGS], cases]))
    assert done.returncode == 0, done.stdout + done.stderr
    told = dict(zip(cases, done.stdout.split("CASE ")[1:], strict=True))
    step = {name: _samples(task / name / "step_000002.jsonl") for name in cases}
    assert "warning" not in told["same"] and {sample["weight_version"] for sample in step["same"]} == {0}

    assert "(12 prompts, now 13), so the checkpoint's position (epoch 0, prompt 8) does not apply" in told["moved"]
    assert "dropped" not in told["moved"]
    answered = [[(s["uid"], s["prompt"], s["response"]) for s in step[name]] for name in ("same", "moved")]
    assert answered[0] == answered[1]

    assert "(still 12 prompts, but of other content or order)" in told["reworded"]
    assert "carried groups dropped: the training data no longer contain their prompts" in told["reworded"]
    assert all(s["prompt"].startswith("0+") and s["weight_version"] == 1 for s in step["reworded"])


def _samples(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
