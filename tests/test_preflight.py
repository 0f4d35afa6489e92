"""Mistakes in what a configuration names: files, data, the model's folder, the mesh, a checkpoint.

Most tests call `dapo-mcore config` in this process: it checks all that can be checked before a run. A few call `train`.
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
from dapo_mcore.config.file import load_config, parse_config
from dapo_mcore.model_files.model_folder import _snapshot
from dapo_mcore.preflight import check_files_of, describe_run, describe_step
from tests.checkpoint.stored_checkpoint import truncate, write_checkpoint
from tests.fake_hub import fake_hub
from tests.mistakes import mistake
from tests.model_files.character_model import CONFIG, write_tokenizer

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
    """A folder with a configuration and all files that it names. It is the working directory."""
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
    """Return a function that appends a row to the file."""
    return lambda: Path(file).write_text(Path(file).read_text() + json.dumps(columns) + "\n")


def text(file: str, content: str | bytes) -> Callable[[], None]:
    return lambda: void(Path(file).write_bytes(content.encode() if isinstance(content, str) else content))


def gone(file: str) -> Callable[[], None]:
    return Path(file).unlink


def model_key(**changes: object) -> Callable[[], None]:
    return lambda: change_json("model/config.json", changes)


def sglang(version: str | None) -> Callable[[], None]:
    """Return a function that makes an interpreter whose environment has this version of SGLang."""
    options = {"mem-fraction-static": "one", "disable-radix-cache": "flag"}
    told = json.dumps({"version": version, "models": [], "options": options})

    def make() -> None:
        Path("python").write_text(f"#!/bin/sh\necho '{told}'\n")
        Path("python").chmod(0o755)

    return make


SERVERS = ["rollout.engine=sglang", "rollout.sglang.python=./python"]


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
    "a reward function that raises": (
        text("r.py", "def f(data_source, solution_str, ground_truth, extra_info):\n    return 1 / 0"),
        ["reward.function=r.py:f"],
        "the response nor for a wrong one: exception: ZeroDivisionError: division by zero; mend the function",
    ),
    "no key file": (
        nothing,
        ["rollout.engine=sglang", "rollout.sglang.key_file=k"],
        "rollout.sglang.key_file k is not a file",
    ),
    "no interpreter": (
        nothing,
        ["rollout.engine=sglang", "rollout.sglang.python=./p"],
        "rollout.sglang.python ./p is not a program",
    ),
    # servers
    "no SGLang": (sglang(None), SERVERS, "python has no SGLang; give the interpreter of an environment that has it"),
    "an option that SGLang lacks": (
        sglang("0.5.21"),
        [*SERVERS, "rollout.sglang.server_args={mem-fraction: 0.5}"],
        "python has no such options; the nearest ones: mem-fraction: mem-fraction-static",
    ),
    "an option's value": (
        sglang("0.5.21"),
        [*SERVERS, "rollout.sglang.server_args={disable-radix-cache: 3}"],
        "server_args: disable-radix-cache takes true or false, not 3",
    ),
    "an SGLang that cannot resume": (
        sglang("0.5.20"),
        [*SERVERS, "sampling.on_full=keep", "algo.tis.mode=truncate"],
        "sampling.on_full keep needs 0.5.21 or newer",
    ),
    "open keys": (
        text("keys.json", "{}"),
        ["rollout.engine=sglang", "rollout.sglang.urls=[http://h:1]", "rollout.sglang.key_file=keys.json"],
        "others could read it: chmod 600 keys.json",
    ),
    "an architecture in FP8": (
        model_key(architectures=["LlamaForCausalLM"], model_type="llama"),
        ["rollout.engine=sglang", "rollout.sglang.quantize=fp8", "model.dtype=bf16"],
        "rollout.sglang.quantize fp8 does not go with LlamaForCausalLM",
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
    "no processes": (
        nothing,
        ["--processes=0"],
        "--processes 0: a run has at least 1 process",
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
    "an ignored field": (
        nothing,
        ["megatron.layernorm_zero_centered_gamma=true"],
        "megatron.layernorm_zero_centered_gamma True would change nothing",
    ),
    "fp8 in the wrong section": (nothing, ["megatron.fp8=hybrid"], "the section model.fp8 decides it"),
    "recomputed experts of a dense model": (
        nothing,
        ["model.recompute=[mlp, moe]"],
        "model.recompute moe would save nothing: this Qwen2ForCausalLM has no experts",
    ),
    "a delayed recipe": (nothing, ["model.fp8.recipe=delayed"], "model.fp8: recipe delayed"),
    "too many bf16 layers": (
        nothing,
        ["model.fp8.first_last_bf16=9"],
        "model.fp8.first_last_bf16 9 keeps 18 layers in bf16",
    ),
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
    # tools
    "no tool": (
        nothing,
        ["tools=[{name: find, function: 'gone.py:find', parameters: {type: object}}]"],
        "tools: find has function 'gone.py:find', but there is no file /",
    ),
    "a chat template without tools": (
        text("chat.jinja", "{{ messages[-1].content }}"),
        [
            "tools=[{name: sum, function: calculator}]",
            "data.chat_template=chat.jinja",
            "eval.sets.held.chat_template=chat.jinja",
        ],
        "data.chat_template does not declare tools, so the policy would not know of them",
    ),
    # services
    "no DALI": (nothing, ["batch.feeder=dali"], "batch.feeder dali needs NVIDIA DALI"),
    "no wandb": (nothing, ["observe.wandb_project=p"], "observe.wandb_project is set, but wandb"),
}


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no state": (
        lambda path: (path / "state.json").unlink(),
        "state.json is missing; a start with checkpoint.resume auto sets step_000002 aside",
    ),
    "cut tensors": (truncate("shards/rank_00000.safetensors", 80), "shards/rank_00000.safetensors is truncated"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_mistake_in_a_checkpoint(case: str, task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = task / "runs/run/checkpoints"
    for step in ("step_000001", "step_000002"):
        write_checkpoint(folder / step)
    assert main(["config", "run.yaml"]) == 0
    capsys.readouterr()
    spoil, expected = CHECKPOINTS[case]
    spoil(folder / "step_000002")
    assert expected in mistake(["config", "run.yaml"], capsys)
    assert main(["config", "run.yaml", "checkpoint.resume=never"]) == 0


@pytest.mark.parametrize("case", RUNS)
def test_a_mistake_in_what_the_configuration_names(
    case: str, task: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "nvidia.dali.plugin.pytorch.torch_utils"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    spoil, arguments, expected = RUNS[case]
    spoil()
    message = mistake(["config", "run.yaml", *arguments], capsys)
    assert expected in message
    assert not (task / "runs").exists()


def test_a_tools_file_may_be_on_the_nodes_of_a_cluster_alone(task: Path) -> None:
    tool = "{name: find, function: 'gone.py:find', parameters: {type: object}, placement: ray, workers: 1}"
    check_files_of(load_config("run.yaml", [f"tools=[{tool}]"]))


def test_a_good_configuration_is_described_and_printed(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "run.yaml", "seed=1", "seed=2"]) == 0
    out, err = capsys.readouterr()
    assert "seed: 2" in out
    assert err.splitlines() == [
        "# seed=1 is given, but seed=2 comes after it and replaces it",
        "# data: 4 rows gave 4 prompts",
        "# eval.sets.held: 4 rows gave 4 prompts",
        "# evaluation every 5 rollout steps, before the first step and after the last: held 4 prompts × 8 = 32; together 32 samples",
        "# an update trains on 2 prompts × 4 = 8 samples of at most 24 tokens, prompt included: up to 192 tokens",
        "# learning rate: 1e-06 after a warm-up of 10 updates (5 rollout steps)",
        "# a rollout step generates 4 prompts × 4 = 16 responses of up to 16 tokens, and trains on 4 × 4 in 2 updates",
    ]


def test_servers_that_fit_and_servers_on_other_machines_are_accepted(task: Path) -> None:
    sglang("0.5.21")()
    assert main(["config", "run.yaml", *SERVERS, "rollout.sglang.server_args={mem_fraction_static: 0.5}"]) == 0
    Path("python").write_text("not asked")
    cluster = ["rollout.sglang.placement=ray", "rollout.sglang.host=node", "ray.address=h:1"]
    for elsewhere in (["rollout.sglang.urls=[http://h:1]"], cluster):
        assert main(["config", "run.yaml", *SERVERS, *elsewhere]) == 0


# prints the status and message of each call of train, and whether torch and megatron were imported by then
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


def test_train_reports_mistakes_before_it_imports_slow_packages(task: Path) -> None:
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


def test_overrides_of_config_json_are_told_and_servers_elsewhere_need_them_too(task: Path) -> None:
    overrides = ["model.overrides={max_position_embeddings: 64}"]
    line = "model.overrides: max_position_embeddings 64 (in config.json 32); for actor, servers and exports"
    assert describe_run(load_config(task / "run.yaml", overrides))[1:] == [line]
    elsewhere = ["rollout.engine=sglang", "rollout.sglang.urls=['http://127.0.0.1:3']", "rollout.sglang.key_file=k"]
    (told,) = describe_run(load_config(task / "run.yaml", [*overrides, *elsewhere]))[1:]
    assert told.endswith("need --json-model-override-args '{\"max_position_embeddings\": 64}'")


def test_a_source_without_a_rule_is_found_before_the_run(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "run.yaml", "reward.function=by_source"])
    told = capsys.readouterr().err
    assert (
        "reward.function by_source has no rule for '' (4 of 4 prompts of data: these rows have no source; name its column in data.source_key), '' (4"
        in told
    )
    assert main(["config", "run.yaml", "reward.function=by_source", "reward.by_source={'': gsm8k}"]) == 0


def test_the_line_about_a_step_names_the_sizes_that_are_still_the_papers() -> None:
    line = "a rollout step generates 1,536 prompts × 16 = 24,576 responses of up to 20,480 tokens at a time, and trains on 512 × 16 in 16 updates"
    tree = {"model": {"path": "m"}, "data": {"files": ["d"]}}
    assert describe_step(parse_config(tree)) == (
        f"{line}; the paper's size by default, to be lowered for a smaller run: sampling.gen_batch_prompts, "
        "sampling.train_batch_prompts, rollout.group_size, rollout.max_response_tokens"
    )
    chosen = {
        "sampling": {"gen_batch_prompts": 1536, "train_batch_prompts": 512},
        "rollout": {"group_size": 16, "max_response_tokens": 20480},
    }
    assert describe_step(parse_config(tree | chosen)) == line


def test_a_run_of_epochs_is_told_its_steps_by_all_of_its_prompts(
    task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 prompts × 3 epochs in steps of 4; the critic's and the profile's steps are held against that."""
    assert main(["config", "run.yaml", "num_epochs=3"]) == 0
    assert "# num_epochs 3 × 4 prompts: 3 rollout steps, 6 gradient steps at most" in capsys.readouterr().err
    assert main(["config", "run.yaml", "num_epochs=3", "observe.profile_steps=[4]"]) == 2
    assert "profile_steps has 4, but num_epochs 3 × 4 prompts give at most 3 rollout steps" in capsys.readouterr().err


def test_settings_without_effect_are_told(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "run.yaml", "rollout.sglang.num_servers=2", "algo.kl.estimator=k1"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert told == [
        "# no effect: rollout.sglang.num_servers 2 (rollout.engine is embedded)",
        "# no effect: algo.kl.estimator k1 (algo.kl.coef is 0)",
    ]


def test_weights_that_are_not_in_the_cache_are_told_and_offline_refused(
    task: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    files = {path.name: path.read_bytes() for path in (task / "model").iterdir()}
    with fake_hub({"models/Org/Tiny": files | {"model.safetensors": b"-"}}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(task / "hub"))
        command = ["config", "run.yaml", "model.path=Org/Tiny", "model.init=pretrained"]
        assert main(command) == 0 and "the run downloads them first" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _snapshot.cache_clear()
    assert main(command) == 2 and "is not in the cache" in capsys.readouterr().err
