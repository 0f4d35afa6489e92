"""Real rows through the real Qwen tokenizer and chat template: examples/gsm8k.yaml with a small random model, TP 2."""

from __future__ import annotations

import json
import re
import shutil

from tests.train.runs import ROOT, TRAIN, python, torchrun

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}

# answers of random weights are never right, so no group would vary; any reward that varies will do
REWARD = """
import zlib

def compute_score(data_source, solution_str, ground_truth, extra_info):
    assert ground_truth.replace(",", "").lstrip("-").isdigit(), ground_truth
    return float(zlib.crc32(solution_str.encode()) % 2) * 2 - 1
"""


def test_two_steps_on_gsm8k_with_qwens_vocabulary(real_data, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))
    shutil.copy(real_data("qwen/tokenizer.json"), model)
    (tmp_path / "reward.py").write_text(REWARD)
    overrides = [
        f"model.path={model}",
        "model.init=random",
        "model.dtype=fp32",
        f"data.files=[{real_data('gsm8k/train.jsonl')}]",
        f"data.chat_template={real_data('qwen/qwen2_5.jinja')}",
        "data.limit=64",
        "eval.sets={}",
        "reward.function=reward.py:compute_score",
        "reward.overlong.penalty=false",
        "rollout.group_size=4",
        "rollout.max_response_tokens=24",
        "sampling.train_batch_prompts=4",
        "sampling.gen_batch_prompts=4",
        "batch.mini_batch_prompts=2",
        "batch.max_tokens=1024",
        "num_rollout_steps=2",
    ]
    done = python(tmp_path, *torchrun(2), *TRAIN, str(ROOT / "examples/gsm8k.yaml"), *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/gsm8k/metrics.jsonl").read_text().splitlines()]
    assert [row["updates"] for row in rows] == [2, 4]
    for row in rows:
        print({key: row[key] for key in ("memory/rss_gib", "time/step_s", "time/generate_s", "time/train_s")})
        assert row["actor/first_update_ratio_deviation"] == 0.0
        assert row["mismatch/logprob_diff_max"] < 1e-4
        assert row["actor/grad_norm"] > 0
    sample = json.loads(next((tmp_path / "runs/gsm8k/samples").glob("*.jsonl")).read_text().splitlines()[0])
    assert re.search(r"<\|im_start\|>user\nSolve the following math problem", sample["prompt"])
    assert sample["prompt"].endswith("<|im_start|>assistant\n")
