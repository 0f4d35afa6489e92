"""Mistakes in a configuration: each gives one short line with the key, the numbers and the remedy.

Mistakes in the files that it names are in test_preflight.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mistakes import mistake

BASE = "model: {path: model}\ndata: {files: [train.jsonl]}\n"
LONG = "x" * 300

OVERRIDES = {
    # values that are no numbers, or far too large
    "optimizer.lr=.inf": "optimizer.lr is inf; set a finite number that is above 0 and at most 1",
    "optimizer.lr=1e30": "optimizer.lr is 1e+30; set a finite number that is above 0 and at most 1",
    "optimizer.lr=-1e-6": "optimizer.lr is -1e-06; set a finite number that is above 0 and at most 1",
    "optimizer.lr=fast": "optimizer.lr is 'fast'; set a finite number that is above 0 and at most 1",
    "optimizer.min_lr=1e-3": "optimizer.min_lr 0.001 is above optimizer.lr 1e-06",
    "optimizer.weight_decay=.nan": "optimizer.weight_decay is nan; set a finite number that is at least 0 and at most 10",
    "rollout.temperature=.inf": "rollout.temperature is inf; set a finite number that is above 0 and at most 100",
    "rollout.temperature=0": "rollout.temperature is 0; set a finite number that is above 0",
    "rollout.top_p=1.5": "rollout.top_p is 1.5; set a finite number that is above 0 and at most 1",
    "rollout.top_k=0": "rollout.top_k: top_k 0 leaves no token to draw; use -1 for all of them",
    "rollout.top_k=-2": "rollout.top_k is -2; set a whole number that is at least -1",
    "rollout.stop=['']": "rollout.stop: a stop is a text of one or more characters or a token id from 0 on, not ''; correct it",
    "rollout.stop=[-1]": "rollout.stop: a stop is a text of one or more characters or a token id from 0 on, not -1; correct it",
    "rollout.stop=[yes]": "rollout.stop.0 is true; set text, or a whole number",
    "rollout.group_size=100000000000": "rollout.group_size is 100000000000; set a whole number that is at least 1 and at most 1000000",
    "rollout.group_size=1e11": "rollout.group_size is 100000000000.0; set a whole number that is at least 1 and at most 1000000",
    "rollout.group_size=2.5": "rollout.group_size is 2.5; set a whole number",
    "rollout.group_size=yes": "rollout.group_size: true and false are no numbers; set a number (got true)",
    "rollout.group_size=017": "YAML reads 017 in base 8 or 60; write it in base 10",
    "algo.entropy_coef=.nan": "algo.entropy_coef is nan; set a finite number",
    "algo.entropy_coef=-0.01": "algo.entropy_coef is -0.01; set a finite number that is at least 0",
    "algo.kl.coef=.inf": "algo.kl.coef is inf; set a finite number",
    "algo.dual_clip=1": "algo.dual_clip is 1; set a finite number that is above 1, or null",
    "reward.failure_value=-.inf": "reward.failure_value is -inf; set a finite number that is at least -1000 and at most 1000",
    "reward.timeout_seconds=1e300": "reward.timeout_seconds is 1e+300; set a finite number that is above 0 and at most 2592000",
    "rollout.sglang.read_timeout_s=1:30": "YAML reads 1:30 in base 8 or 60; write it in base 10",
    "seed=18446744073709551616": "seed is 18446744073709551616; set a whole number that is at least 0 and below 9223372036854775808",
    "seed=-1": "seed is -1; set a whole number that is at least 0",
    f"seed={'9' * 5000}": "the value of override 'seed=99999",
    "eval.temperature=.nan": "eval.temperature is nan; set a finite number",
    "checkpoint.keep_rollouts=true checkpoint.at_end=false": "keep_rollouts true saves an unfinished rollout when a run is ended",
    "parallel.hang_minutes=0": "parallel.hang_minutes is 0; set a finite number that is above 0 and at most 1440, or null",
    "parallel.hang_minutes=300": "parallel: hang_minutes 300 is above timeout_minutes 240, so",
    "parallel.timeout_minutes=1e9": "parallel.timeout_minutes is 1000000000.0; set a whole number that is at least 1 and at most 43200",
    # names, texts and words
    f"name={LONG}": "name: a name has 1 to 128 letters, digits, dots, dashes and underscores, the first a letter or digit; this one has 300",
    "name=": "this one has 0 characters",
    "name=a/b": "name: a name has 1 to 128 letters",
    f"eval.sets.{LONG}.files=a.jsonl": "this one has 300 characters",
    "model.path=": "model.path: a path is not empty",
    f"model.path={LONG}": "this one's longest part has 300",
    "model.path=$NOWHERE/m": "model.path: the environment variable 'NOWHERE' is not set; set it, or write the path without it",
    f"data.files=[a.jsonl,{LONG}.jsonl]": "data.files.1: a path is not empty and its parts have at most 255 bytes",
    "data.files=~nobody-here/a.jsonl": "data.files.0: there is no user 'nobody-here' whose home folder ~ could mean",
    "algo.kl.estimator=k4": "algo.kl.estimator is 'k4'; set k1, k2 or k3",
    "batch.packing=maybe": "batch.packing is 'maybe'; set true or false",
    "checkpoint.keep_rollouts=maybe": "checkpoint.keep_rollouts is 'maybe'; set true or false",
    "optimizer.spike_factor=0.5": "optimizer.spike_factor is 0.5; set a finite number that is above 1 and at most 1000000, or null",
    "data={files: a, chat_template: 5}": "data.chat_template is 5; set true or false, or text",
    "observe={profile_steps: [2, 0]}": "observe.profile_steps.1 is 0; set a whole number that is at least 1",
    "data.files=[]": "data.files is []; set a list whose length is at least 1, each item text",
    "data.system_prompt=null data.prompt_key=null": "data.prompt_key is null; set text",
    # wording of prompts
    "data.answer_pattern=####": "data.answer_pattern: this pattern has no group; put parentheses around the answer: '#### (.+)' (got '####')",
    "data.answer_pattern=(": "data.answer_pattern: this is no regular expression: missing ), unterminated subpattern",
    "data.prompt_template=Q": "data.prompt_template: this template does not contain {prompt}, the place of the row's prompt; add it (got 'Q')",
    "data.system_prompt=S data.chat_template=false": "data: system_prompt needs a chat template; set chat_template, or drop the prompt",
    "data.chat_template=true data.add_bos=true": "data: add_bos is for plain text; a chat template writes its own BOS",
    "eval.sets.a.files=a eval.sets.a.answer_pattern=x": "eval.sets.a.answer_pattern: this pattern has no group",
    # keys
    "group_size=4": "unknown key 'group_size'; did you mean 'rollout.group_size'?",
    "algo.kl_coef=0.1": "unknown key 'algo.kl_coef'; did you mean 'algo.kl.coef'?",
    "algo.adv_estimator=grpo": "unknown key 'algo.adv_estimator'; did you mean 'algo.advantage'?",
    "algo.filter_groups=true": "unknown key 'algo.filter_groups'; the keys of algo are clip_low, clip_high, ",
    "reward.reward_manager=dapo": "unknown key 'reward.reward_manager'; did you mean 'reward.function'?",
    "trainer.total_epochs=3": "'trainer.total_epochs': this is verl's name for num_epochs (every prompt once per epoch; or num_rollout_steps)",
    "actor_rollout_ref.rollout.n=8": "'actor_rollout_ref.rollout.n': this is verl's name for rollout.group_size (responses per prompt)",
    "actor_rollout_ref.rollout.top_p=1": "'actor_rollout_ref.rollout.top_p': this is verl's name for rollout.top_p",
    "actor_rollout_ref.rollout.name=vllm": "this is verl's name for rollout.engine (servers are SGLang's: vLLM's options do not carry over)",
    "actor_rollout_ref.actor.entropy_coeff=0": "actor.entropy_coeff': this is verl's name for algo.entropy_coef",
    f"algo.{'z' * 5000}=1": "unknown key 'algo.zzzz",
    "algo.clip_high": "override 'algo.clip_high' is not of the form section.key=value",
    "=3": "override '=3' is not of the form section.key=value",
    "seed.x=3": "override 'seed.x=3': seed is a value, not a section, and has no x",
    "data.files.0=a": "override 'data.files.0=a': data.files is a value, not a section, and has no 0",
    "algo=3": "algo is a section, not a value (got 3); set its keys (clip_low, clip_high, dual_clip, ",
    "optimizer=": "optimizer is a section, not a value (got null); set its keys (lr, min_lr, ",
    "eval.sets.a=3": "on_bad_row, deduplicate, shuffle, limit and 7 more) as eval.sets.a.files=…",
    "rollout.sglang=x": " more) as rollout.sglang.urls=…",
    "warm_start=3": "batch_size, max_updates, lr, warmup_updates, weight_decay, stop_at, check_every, choose) as "
    "warm_start.files=…, or null to turn it off",
    "eval.sets=3": "eval.sets is a section, not a value (got 3); set names in it as eval.sets.NAME=…, or {} for none",
    "warm_start=none": "warm_start: only null turns it off or leaves it unset (got 'none')",
    "warm_start=false": "warm_start: only null turns it off or leaves it unset (got false)",
    "algo.dual_clip=off": "algo.dual_clip: only null turns it off or leaves it unset (got false)",
    "observe.wandb_project=None": "observe.wandb_project: only null turns it off or leaves it unset (got 'None')",
    "warm_start={lr: 1e-3}": "warm_start.files is missing; it has no default",
    "data={files: a, limit: 1, limit: 2}": "gives data.limit twice, in lines 1 and 1; keep one of them",
    "megatron={a: !!python/object:os.system x}": "the tag tag:yaml.org,2002:python/object:os.system is not supported",
    "megatron={a: [}": "is not valid YAML",
}

FILES: dict[str, tuple[str | bytes, str]] = {
    "a key twice": (BASE + "seed: 1\nseed: 2\n", "gives seed twice, in lines 3 and 4; keep one of them"),
    "a value cut": (
        "model: {path: m}\ndata:\n  files: a\n  answer_pattern: #### (.+)\n",
        "line 4: YAML takes '#### (.+)' after data.answer_pattern for a comment; quote the whole text if it belongs to it",
    ),
    "an unquoted brace": (
        "model: {path: m}\ndata:\n  files: a\n  prompt_template: {prompt}\n",
        "line 4: data.prompt_template is text, but YAML reads a collection; put the text in quotes",
    ),
    "an unquoted colon": (
        BASE + "name: a: b\n",
        "line 3, column 8 is not valid YAML: mapping values are not allowed here",
    ),
    "a tab": (
        BASE + "algo:\n\tclip_low: 1\n",
        "line 4, column 1 is not valid YAML: while scanning for the next token found character '\\t'",
    ),
    "nothing": ("", "is empty; examples are in examples/*.yaml"),
    "comments alone": ("# model: x\n", "is empty; examples are in examples/*.yaml"),
    "a list": ("- model: x\n", "must hold a mapping of sections, not a list"),
    "no model": ("data: {files: a}\n", "model is missing; it has no default"),
    "UTF-16": (BASE.encode("utf-16"), "line 1 is not UTF-8 (byte 0xff); save the file as UTF-8"),
    "Latin-1": ((BASE + "# é\n").encode("latin-1"), "line 3 is not UTF-8 (byte 0xe9); save the file as UTF-8"),
    "binary": (bytes(range(32)), "is not valid YAML: unacceptable character #x0000"),
    "a big file": (b"#" * 2**21, "has more than 1048576 bytes"),
    "a tag": (BASE + "name: !!python/name:os.system\n", "line 3: the tag tag:yaml.org,2002:python/name:os.system"),
    "a bomb": (
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
        "stands for more than 20000 values, counting each anchor where it is used",
    ),
    "an anchor in itself": (BASE + "megatron: &m {a: *m}\n", "line 3: the anchor contains itself; write it out"),
    "brackets without end": ("a: " + "[" * 5000, "is nested too deeply"),
    "a collection as key": (BASE + "megatron: {[a, b]: 1}\n", "line 3: a key must be a word, not a collection"),
    "two documents": (BASE + "---\n" + BASE, "expected a single document in the stream"),
    "many unknown keys": (BASE + "".join(f"zz{i}: 1\n" for i in range(900)), "and 892 more mistakes"),
    "a huge value": (BASE + f"optimizer: {{lr: {'x' * 500_000}}}\n", "optimizer.lr is 'xxx"),
}


@pytest.mark.parametrize("overrides", OVERRIDES, ids=lambda text: text[:40])
def test_a_mistake_in_an_override(overrides: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(BASE)
    arguments = [overrides] if "{" in overrides else overrides.split()
    message = mistake(["config", str(tmp_path / "run.yaml"), *arguments], capsys)
    assert OVERRIDES[overrides] in message
    assert len(message.splitlines()) == 1
    assert mistake(["config", "--only-values", str(tmp_path / "run.yaml"), *arguments], capsys) == message


@pytest.mark.parametrize("case", FILES)
def test_a_mistake_in_the_file(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = FILES[case]
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in mistake(["config", str(path)], capsys)


def test_a_configuration_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a folder; name the YAML file" in mistake(["config", str(tmp_path)], capsys)
    assert f"no configuration file at {tmp_path / 'no'}" in mistake(["config", str(tmp_path / "no")], capsys)
    assert "cannot be read: File name too long" in mistake(["config", LONG], capsys)


def test_a_byte_order_mark_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dapo_mcore.config.file import load_config

    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_config(tmp_path / "run.yaml").model.path == "model"
