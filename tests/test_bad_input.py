"""Mistakes that users make, each told by one short line that names the key, the numbers and the remedy.

Most go through `dapo-mcore config` in this process, which knows all that can be known before a run; a few through `train`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dapo_mcore.cli import main
from tests.data.conftest import CONFIG, write_tokenizer

BASE = "model: {path: model}\ndata: {files: [train.jsonl]}\n"
LONG = "x" * 300

OVERRIDES = {
    # numbers that are none, or beyond any use
    "optimizer.lr=.inf": "optimizer.lr: Input should be a finite number (got inf)",
    "optimizer.lr=1e30": "optimizer.lr: Input should be less than or equal to 1 (got 1e+30)",
    "optimizer.lr=-1e-6": "optimizer.lr: Input should be greater than 0",
    "optimizer.lr=fast": "optimizer.lr: Input should be a valid number, unable to parse string as a number (got 'fast')",
    "optimizer.min_lr=1e-3": "optimizer.min_lr 0.001 is above optimizer.lr 1e-06",
    "optimizer.weight_decay=.nan": "optimizer.weight_decay: Input should be a finite number (got nan)",
    "rollout.temperature=.inf": "rollout.temperature: Input should be a finite number",
    "rollout.temperature=0": "rollout.temperature: Input should be greater than 0 (got 0)",
    "rollout.top_p=1.5": "rollout.top_p: Input should be less than or equal to 1 (got 1.5)",
    "rollout.top_k=0": "rollout.top_k: top_k 0 leaves no token to draw; use -1 for all of them",
    "rollout.top_k=-2": "rollout.top_k: Input should be greater than or equal to -1",
    "rollout.group_size=100000000000": "rollout.group_size: Input should be less than or equal to 1000000 (got 100000000000)",
    "rollout.group_size=1e11": "rollout.group_size: Input should be less than or equal to 1000000 (got 1",
    "rollout.group_size=2.5": "rollout.group_size: Input should be a valid integer",
    "rollout.group_size=yes": "rollout.group_size: Input should be a number, not true or false (got True)",
    "rollout.group_size=017": "YAML reads 017 in base 8 or 60; write it in base 10",
    "algo.entropy_coef=.nan": "algo.entropy_coef: Input should be a finite number (got nan)",
    "algo.entropy_coef=-0.01": "algo.entropy_coef: Input should be greater than or equal to 0",
    "algo.kl.coef=.inf": "algo.kl.coef: Input should be a finite number",
    "algo.dual_clip=1": "algo.dual_clip: Input should be greater than 1 (got 1)",
    "reward.failure_value=-.inf": "reward.failure_value: Input should be a finite number",
    "reward.timeout_seconds=1e300": "reward.timeout_seconds: Input should be less than or equal to 2592000 (got 1e+300)",
    "rollout.sglang.read_timeout_s=1:30": "YAML reads 1:30 in base 8 or 60; write it in base 10",
    "seed=18446744073709551616": "seed: Input should be less than 9223372036854775808 (got 18446744073709551616)",
    "seed=-1": "seed: Input should be greater than or equal to 0 (got -1)",
    f"seed={'9' * 5000}": "the value of override 'seed=99999",
    "eval.temperature=.nan": "eval.temperature: Input should be a finite number",
    "parallel.timeout_minutes=1e9": "parallel.timeout_minutes: Input should be less than or equal to 43200",
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
    "algo.kl.estimator=k4": "algo.kl.estimator: Input should be 'k1', 'k2' or 'k3' (got 'k4')",
    "batch.packing=maybe": "batch.packing: Input should be a valid boolean, unable to interpret input (got 'maybe')",
    "data.files=[]": "data.files: List should have at least 1 item",
    "data.system_prompt=null data.prompt_key=null": "data.prompt_key: Input should be a valid string (got None)",
    # keys
    "group_size=4": "unknown key 'group_size'; did you mean 'rollout.group_size'?",
    "algo.kl_coef=0.1": "unknown key 'algo.kl_coef'; did you mean 'algo.kl.coef'?",
    f"algo.{'z' * 5000}=1": "unknown key 'algo.zzzz",
    "algo.clip_high": "override 'algo.clip_high' is not of the form section.key=value",
    "=3": "override '=3' is not of the form section.key=value",
    "seed.x=3": "override 'seed.x=3': seed is a value, not a section, and has no x",
    "data.files.0=a": "override 'data.files.0=a': data.files is a value, not a section, and has no 0",
    "algo=3": "algo: Input should be a valid dictionary or instance of AlgoConfig (got 3)",
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
    "a huge value": (BASE + f"optimizer: {{lr: {'x' * 500_000}}}\n", "optimizer.lr: Input should be a valid number"),
}


def mistake(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a call of the command that must fail on its user's account."""
    assert main(argv) == 2, argv
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dapo-mcore {argv[0]}: ")
    lines = err.splitlines()
    assert all(len(line) < 500 for line in lines), err
    return err


@pytest.mark.parametrize("overrides", OVERRIDES, ids=lambda text: text[:40])
def test_a_mistake_in_an_override(overrides: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(BASE)
    arguments = [overrides] if "{" in overrides else overrides.split()
    message = mistake(["config", str(tmp_path / "run.yaml"), *arguments], capsys)
    assert OVERRIDES[overrides] in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("case", FILES)
def test_a_mistake_in_the_file(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = FILES[case]
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in mistake(["config", str(path)], capsys)


ROOT = Path(__file__).parents[1]
GOOD = """
model: {path: model, init: random}
data: {files: train.jsonl, answer_key: answer, max_prompt_tokens: 8}
eval: {sets: {held: {files: held.jsonl, answer_key: answer, max_prompt_tokens: 8}}}
warm_start: {files: demos.jsonl, batch_size: 2}
rollout: {group_size: 4, max_response_tokens: 16}
sampling: {style: none, train_batch_prompts: 4}
batch: {mini_batch_prompts: 2, max_tokens: 64}
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration and all that it names, and the working directory."""
    (tmp_path / "run.yaml").write_text(GOOD)
    for name in ("train", "held"):
        rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "demos.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n' * 3)
    model = tmp_path / "model"
    model.mkdir()
    change_json(model / "config.json", CONFIG | {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32})
    write_tokenizer(model, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change_json(path: Path | str, changes: dict) -> None:
    before = json.loads(Path(path).read_text()) if Path(path).is_file() else {}
    Path(path).write_text(json.dumps(before | changes))


def row(file: str, **columns: object) -> Callable[[], None]:
    """Appends a row."""
    return lambda: Path(file).write_text(Path(file).read_text() + json.dumps(columns) + "\n")


def text(file: str, content: str | bytes) -> Callable[[], None]:
    return lambda: void(Path(file).write_bytes(content.encode() if isinstance(content, str) else content))


def gone(file: str) -> Callable[[], None]:
    return Path(file).unlink


def model_key(**changes: object) -> Callable[[], None]:
    return lambda: change_json("model/config.json", changes)


def void(_: object) -> None: ...


def nothing() -> None: ...


RUNS: dict[str, tuple[Callable[[], None], list[str], str]] = {
    # files that are not there
    "no data": (gone("train.jsonl"), [], "no data file at train.jsonl; correct data.files"),
    "no evaluation set": (gone("held.jsonl"), [], "no data file at held.jsonl; correct eval.sets.held.files"),
    "no demonstrations": (gone("demos.jsonl"), [], "no data file at demos.jsonl; correct warm_start.files"),
    "no choose set": (
        nothing,
        ["warm_start.choose={files: c.jsonl}"],
        "no data file at c.jsonl; correct warm_start.choose.f",
    ),
    "no model": (nothing, ["model.path=nowhere"], "model.path 'nowhere' is not a folder"),
    "no config.json": (gone("model/config.json"), [], "no config.json in model"),
    "no tokenizer": (gone("model/tokenizer.json"), [], "no tokenizer can be loaded from model"),
    "no weights": (nothing, ["model.init=pretrained"], "safetensors"),
    "no chat template": (nothing, ["data.chat_template=no.jinja"], "data.chat_template 'no.jinja' is not a file"),
    "no reward": (nothing, ["reward.function=no.py:f"], "no.py"),
    "no such function": (text("r.py", "def g(): ..."), ["reward.function=r.py:f"], "f"),
    "no key file": (
        nothing,
        ["rollout.engine=sglang", "rollout.sglang.key_file=k"],
        "rollout.sglang.key_file k is not a file",
    ),
    "no interpreter": (
        nothing,
        ["rollout.engine=sglang", "rollout.sglang.python=./p"],
        "rollout.sglang.python ./p is no program",
    ),
    # meshes
    "heads": (
        nothing,
        ["parallel.tensor_parallel=3"],
        "tensor_parallel 3 does not divide num_attention_heads 4; use 1, 2 or 4",
    ),
    "stages": (
        nothing,
        ["parallel.pipeline_parallel=9"],
        "pipeline_parallel 9 leaves stages empty: num_hidden_layers is 4",
    ),
    "experts": (
        nothing,
        ["parallel.expert_parallel=2"],
        "has no experts, so parallel.expert_parallel must be 1 (here 2)",
    ),
    "processes": (
        nothing,
        ["parallel.tensor_parallel=2", "--processes=3"],
        "world size 3 is not a multiple of tensor_parallel 2",
    ),
    "data parallel": (
        nothing,
        ["parallel.data_parallel=2", "--processes=3"],
        "start 2 processes or change the mesh",
    ),
    # the megatron section
    "an unknown field": (
        nothing,
        ["megatron.layernorm_eps=1e-6"],
        "megatron.layernorm_eps is not a field of megatron-core's",
    ),
    "an owned field": (
        nothing,
        ["megatron.num_layers=3"],
        "megatron.num_layers 3 is decided by the model, parallel and batch",
    ),
    "an ignored field": (nothing, ["megatron.fp8=hybrid"], "megatron.fp8 'hybrid' "),
    # the model's folder
    "an activation": (model_key(hidden_act="gelu"), [], "hidden_act 'gelu' in config.json is not supported"),
    "an unknown key": (model_key(soft_cap=30), [], "soft_cap 30 in config.json is not understood"),
    "an architecture": (
        model_key(architectures=["GPT2LMHeadModel"]),
        [],
        "architecture GPT2LMHeadModel is not supported",
    ),
    "a model type": (model_key(model_type="nonsense"), [], "transformers cannot read model/config.json"),
    "broken JSON": (text("model/config.json", "{"), [], "model/config.json is not valid JSON"),
    "JSON that is a list": (
        text("model/config.json", "[]"),
        [],
        "model/config.json must hold a JSON object, not a list",
    ),
    "an embedding too small": (model_key(vocab_size=50), [], "but the model has vocab_size 50"),
    "no end of sequence": (
        lambda: change_json("model/tokenizer_config.json", {"eos_token": None}),
        [],
        "has no EOS token",
    ),
    "a stop token": (
        text("model/generation_config.json", '{"eos_token_id": "end"}'),
        [],
        "eos_token_id must be a token id or a list of them, got 'end'",
    ),
    "weights that are none": (
        text("model/model.safetensors", b"\0" * 64),
        ["model.init=pretrained"],
        "model.safetensors",
    ),
    # rows
    "an empty file": (text("train.jsonl", ""), [], "no usable prompt in train.jsonl: data: 0 rows gave 0 prompts"),
    "a broken row": (text("train.jsonl", "{\n"), [], "train.jsonl row 1: not valid JSON"),
    "no column": (row("train.jsonl", question="x"), [], "train.jsonl row 5: no 'prompt', the row has question"),
    "an answer that is a float": (
        row("held.jsonl", prompt="x", answer=4.5),
        [],
        "held.jsonl row 5: the answer must be text",
    ),
    "a float's remedy": (row("held.jsonl", prompt="x", answer=4.5), [], "set eval.sets.held.on_bad_row skip"),
    "no match": (
        nothing,
        ["data.answer_pattern=#### (.+)"],
        "train.jsonl row 1: data.answer_pattern '#### (.+)' does not occur",
    ),
    "no group": (nothing, ["data.answer_pattern=####"], "data.answer_pattern '####' has no group"),
    "a template without a place": (
        nothing,
        ["data.prompt_template=Q"],
        "data.prompt_template 'Q' does not contain {prompt}",
    ),
    "a system prompt in plain text": (nothing, ["data.system_prompt=S"], "data.system_prompt needs a chat template"),
    "another format": (text("train.jsonl", b"PAR1xxxxPAR1"), [], "train.jsonl is not JSONL"),
    "a long prompt": (
        row("train.jsonl", prompt="1" * 17, answer="1"),
        ["data.max_prompt_tokens=20"],
        "train.jsonl row 5: the prompt has 17 tokens; with rollout.max_response_tokens 16 that is 33, but the model has "
        "max_position_embeddings 32",
    ),
    "a long prompt of a set": (
        row("held.jsonl", prompt="1" * 17, answer="1"),
        ["eval.sets.held.max_prompt_tokens=20"],
        "held.jsonl row 5: the prompt has 17 tokens",
    ),
    "a long demonstration": (
        row("demos.jsonl", prompt="1+1=", response="2" * 30),
        [],
        "demos.jsonl row 4: the demonstration has 35 tokens with its end",
    ),
    "few demonstrations": (nothing, ["warm_start.batch_size=9"], "warm_start.files hold 3 demonstrations, fewer than"),
    # services
    "no wandb": (nothing, ["observe.wandb_project=p"], "observe.wandb_project is set, but wandb"),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_mistake_in_what_the_configuration_names(
    case: str, task: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    spoil, arguments, expected = RUNS[case]
    spoil()
    message = mistake(["config", "run.yaml", *arguments], capsys)
    assert expected in message
    assert not (task / "runs").exists()


def test_a_good_configuration_is_told_and_printed(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "run.yaml", "seed=1", "seed=2"]) == 0
    out, err = capsys.readouterr()
    assert "seed: 2" in out
    assert err.splitlines() == [
        "# seed=1 is given, but seed=2 comes after it and replaces it",
        "# data: 4 rows gave 4 prompts",
        "# eval.sets.held: 4 rows gave 4 prompts",
        "# a rollout step generates 4 prompts × 4 = 16 responses of up to 16 tokens, and trains on 4 × 4 in 2 updates",
    ]


# status and message of calls of train, and whether torch was imported by then
TRAIN = """
import contextlib, io, json, os, sys
from dapo_mcore.train.__main__ import main
results = []
for environment, arguments in json.load(sys.stdin):
    os.environ.update(environment)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(arguments)
    results.append([status, errors.getvalue(), "torch" in sys.modules, "megatron.core" in sys.modules])
    for name in environment:
        del os.environ[name]
print("RESULTS" + json.dumps(results))
"""


def test_train_tells_mistakes_before_it_imports_what_takes_time(task: Path) -> None:
    cases = [
        (
            {},
            ["run.yaml", "rollout.groupsize=4"],
            "unknown key 'rollout.groupsize'; did you mean 'rollout.group_size'?",
        ),
        ({"WORLD_SIZE": "4"}, ["run.yaml"], "WORLD_SIZE=4 is set, but RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({}, ["run.yaml", "data.files=no.jsonl"], "no data file at no.jsonl; correct data.files"),
        ({}, ["run.yaml", "reward.function=no.py:f"], "no.py"),
        ({}, ["run.yaml", "parallel.tensor_parallel=2"], "world size 1 is not a multiple of tensor_parallel 2"),
        ({}, ["run.yaml", "megatron.num_layer=2"], "megatron.num_layer is not a field of megatron-core's"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        input=json.dumps([case[:2] for case in cases]),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.partition("RESULTS")[2])
    for (_, arguments, message), (status, output, torch, megatron) in zip(cases, results):
        assert (status, megatron) == (2, False), (arguments, output)
        assert output.startswith("error: ") and message in output and len(output.splitlines()) == 1, output
        assert not torch or arguments[1].startswith(("parallel", "megatron")), arguments
    assert not (task / "runs").exists()


def test_under_torchrun_the_mistake_is_the_last_line(task: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "dapo_mcore.train", "run.yaml", "algo.kl_coef=1"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.strip(" =")]
    assert told[-1].endswith("unknown key 'algo.kl_coef'; did you mean 'algo.kl.coef'?"), done.stderr
    assert not (task / "runs").exists()


def test_a_configuration_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a folder; name the YAML file" in mistake(["config", str(tmp_path)], capsys)
    assert f"no configuration file at {tmp_path / 'no'}" in mistake(["config", str(tmp_path / "no")], capsys)
    assert "cannot be read: File name too long" in mistake(["config", LONG], capsys)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dapo_mcore.config_file import load_config

    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_config(tmp_path / "run.yaml").model.path == "model"
