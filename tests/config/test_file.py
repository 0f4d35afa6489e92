"""The configuration refuses what contradicts itself, and says the numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dapo_mcore.config.file import dump_config, load_config, parse_config, record_config, repeated_overrides
from dapo_mcore.config.keys import OLD_KEYS, keys_of
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import ConfigError

MINIMAL: dict[str, Any] = {"model": {"path": "model"}, "data": {"files": ["train.jsonl"]}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    return path


def test_a_minimal_file_gets_the_papers_defaults(file: Path) -> None:
    config = load_config(file)
    assert (config.algo.clip_low, config.algo.clip_high, config.algo.dual_clip) == (0.2, 0.28, None)
    assert config.algo.loss_mode == "token-mean"
    assert config.run_dir == Path("runs/run")


@pytest.mark.parametrize(
    ("override", "value"),
    [("optimizer.lr=1e-6", 1e-6), ("optimizer.lr=3E-4", 3e-4), ("optimizer.lr=.5e-3", 5e-4), ("optimizer.lr=1", 1.0)],
)
def test_overrides_read_numbers_as_people_write_them(file: Path, override: str, value: float) -> None:
    lr = load_config(file, [override]).optimizer.lr
    assert isinstance(lr, float)
    assert lr == value


def test_scientific_notation_is_a_number_where_nothing_coerces_it(file: Path) -> None:
    config = load_config(file, ["megatron.layernorm_epsilon=1e-6"])
    assert config.megatron == {"layernorm_epsilon": 1e-6}


def test_overrides_read_yaml_values_and_the_last_one_wins(file: Path) -> None:
    overrides = ["data.files=[a.jsonl, b.parquet]", "algo.dual_clip=10", "algo.dual_clip=null", "batch.packing=false"]
    config = load_config(file, overrides)
    assert config.data.files == ["a.jsonl", "b.parquet"]
    assert config.algo.dual_clip is None
    assert config.batch.packing is False


@pytest.mark.parametrize("override", ["algo.clip_high", "=3", "algo.clip_high 0.3"])
def test_an_override_without_key_or_value_is_refused(file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"override {override!r} is not of the form section.key=value")):
        load_config(file, [override])


def test_an_override_with_broken_yaml_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("'data.files=[a'")):
        load_config(file, ["data.files=[a"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"no configuration file at {tmp_path / 'no.yaml'}")):
        load_config(tmp_path / "no.yaml")


@pytest.mark.parametrize(("text", "message"), [("a: [1", "not valid YAML"), ("- 1\n- 2", "not a list")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algo.clip_hi=0.3", "unknown key 'algo.clip_hi'; did you mean 'algo.clip_high'?"),
        ("rollout.grup_size=4", "unknown key 'rollout.grup_size'; did you mean 'rollout.group_size'?"),
        ("algo.kl.coeff=0.1", "unknown key 'algo.kl.coeff'; did you mean 'algo.kl.coef'?"),
        ("sampler.style=none", "unknown key 'sampler'; did you mean 'sampling'?"),
        ("group_size=4", "unknown key 'group_size'; did you mean 'rollout.group_size'?"),
        ("algo.kl_coef=0.1", "unknown key 'algo.kl_coef'; did you mean 'algo.kl.coef'?"),
        ("temperature=1", "unknown key 'temperature'; did you mean 'rollout.temperature' or 'eval.temperature'?"),
        ("checkpoint.save_every=1", "unknown key 'checkpoint.save_every'; did you mean 'checkpoint.every'?"),
        ("trainer.save_freq=1", "unknown key 'trainer.save_freq'; did you mean 'checkpoint.every'?"),
        ("data.train_files=a", "unknown key 'data.train_files'; did you mean 'data.files'?"),
        ("max_response_length=1", "unknown key 'max_response_length'; did you mean 'rollout.max_response_tokens'?"),
        (
            "tensor_parallel_size=2",
            "did you mean 'parallel.tensor_parallel' or 'rollout.sglang.tensor_parallel'?",
        ),
        ("eval.sets.aime.group_size=1", "unknown key 'eval.sets.aime.group_size'; did you mean 'rollout.group_size'?"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(file, [override])


@pytest.mark.parametrize("old", OLD_KEYS)
def test_an_old_key_names_the_new_one_and_its_section(file: Path, old: str) -> None:
    new = OLD_KEYS[old]
    *section, key = new.split(".")
    assert key in keys_of(section)
    with pytest.raises(ConfigError) as error:
        load_config(file, [f"{old}=x"])
    assert (
        str(error.value) == f"{old} is now {new}: set {key} in the section {'.'.join(section)} and delete the old key"
    )


def test_each_key_of_an_unknown_section_is_named(file: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(
            file, ["actor_rollout_ref={rollout: {n: 8, top_k: 3}, actor: {optim: {clip_grad: 1}}}", "sampler={}"]
        )
    assert str(error.value).splitlines() == [
        "unknown key 'actor_rollout_ref.rollout.n'; did you mean 'rollout.group_size'?",
        "unknown key 'actor_rollout_ref.rollout.top_k'; did you mean 'rollout.top_k'?",
        "unknown key 'actor_rollout_ref.actor.optim.clip_grad'; did you mean 'optimizer.clip_grad'?",
        "unknown key 'sampler'; did you mean 'sampling'?",
    ]


def test_every_bad_key_is_named_at_once(file: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(file, ["algo.clip_low=-1", "rollout.temperature=0", "algo.zzz=1"])
    text = str(error.value)
    assert "algo.clip_low" in text
    assert "got -1" in text
    assert "rollout.temperature" in text
    assert "unknown key 'algo.zzz'" in text


def test_a_rule_inside_a_section_ends_with_its_remedy_and_not_with_the_section(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"leave num_servers out, or urls to start servers$"):
        load_config(file, ["rollout.sglang={urls: ['http://a:1'], num_servers: 3}"])


LONG = ["data.max_prompt_tokens=100", "rollout.max_response_tokens=205", "parallel.context_parallel=3"]
AHEAD = ["rollout.engine=sglang", "rollout.async_steps=1", "reward.workers=1"]
KEEP = ["rollout.engine=sglang", "sampling.on_full=keep", "algo.old_logprobs=rollout"]
RULES: list[tuple[list[str], str]] = [
    (
        ["sampling.train_batch_prompts=12", "batch.mini_batch_prompts=5"],
        "batch.mini_batch_prompts 5 does not divide sampling.train_batch_prompts 12; use one of 1, 2, 3, 4, 6, 12",
    ),
    (
        [*LONG, "batch.max_tokens=100"],
        "data.max_prompt_tokens 100 + rollout.max_response_tokens 205 = 305 tokens, "
        "but a micro-batch holds batch.max_tokens 100 ",
    ),
    (["parallel.sequence_parallel=true"], "parallel.sequence_parallel needs tensor_parallel > 1, but it is 1"),
    (
        [*LONG, "batch.max_tokens=100"],
        "context_parallel 3 = 300; raise batch.max_tokens to 102 or shorten the prompts or responses",
    ),
    (
        ["reward.overlong.penalty=true", "rollout.max_response_tokens=1000"],
        "reward.overlong.cache 4096 exceeds the maximal length 1000",
    ),
    (["algo.old_logprobs=rollout", "algo.tis.mode=truncate"], "use tis.mode mask or off"),
    (["algo.tis.mode=mask", "algo.tis.cap=0.5"], "which no token meets at tis.cap 0.5; use a cap of at least 1"),
    (["optimizer.schedule=cosine"], "optimizer.schedule cosine needs optimizer.decay_updates"),
    (["model.overrides={num_hidden_layers: 2}"], "set model.init random"),
    (["rollout.group_size=1"], "rollout.group_size is 1; use at least 2, or sampling.style none"),
    (
        ["sampling.style=resample", "sampling.max_samples_per_prompt=8"],
        "sampling.max_samples_per_prompt 8 is below rollout.group_size 16; raise it to at least 16",
    ),
    (["rollout.async_steps=1"], "rollout.async_steps 1 needs rollout.engine sglang: the embedded engine"),
    (["sampling.on_full=abort"], "sampling.on_full abort needs rollout.engine sglang"),
    (["sampling.on_full=keep"], "sampling.on_full keep needs rollout.engine sglang"),
    (["sampling.max_in_flight_groups=8"], "sampling.max_in_flight_groups needs rollout.engine sglang"),
    (
        ["rollout.engine=sglang", "sampling.on_full=keep"],
        "sampling.on_full keep trains on samples of weights one version older or more; correct for it with algo.tis.mode",
    ),
    (
        [*KEEP, "sampling.max_staleness=0"],
        "max_staleness 0 with rollout.async_steps 0 lets none live that long; use at least 1",
    ),
    (
        [*KEEP, *AHEAD, "sampling.max_staleness=1"],
        "max_staleness 1 with rollout.async_steps 1 lets none live that long; use at least 2",
    ),
    (
        [*KEEP, "sampling.max_staleness=3", *AHEAD, "sampling.max_in_flight_groups=3073"],
        "more than gen_batch_prompts 1536 × (max_staleness 3 - async_steps 1) = 3072 groups in flight would be too old",
    ),
    (
        [*KEEP, "sampling.style=none", "sampling.max_in_flight_groups=513"],
        "more than train_batch_prompts 512 × (max_staleness 1 - async_steps 0) = 512 groups in flight would be too old",
    ),
    ([*KEEP, "sampling.carry_surplus=false"], "carry_surplus false throws away what a step has beyond its batch"),
    (
        [*KEEP, "rollout.sglang={urls: ['http://a:1'], router_url: 'http://a:2'}"],
        "sampling.on_full keep must know which server works on a request",
    ),
    (
        [*AHEAD, "algo.tis.mode=mask", "reward.workers=0"],
        "but reward.workers 0 (the default of math_dapo) would run the reward function in a thread",
    ),
    (AHEAD, "correct for it with algo.tis.mode truncate or mask, or with algo.old_logprobs rollout"),
    (
        [*AHEAD, "algo.tis.mode=truncate", "sampling.max_staleness=0"],
        "sampling.max_staleness 0 is below rollout.async_steps 1: every group would be dropped as stale; use at least 1",
    ),
]


CLUSTER = ["rollout.sglang.placement=ray", "ray.address=10.0.0.1:6379"]
RULES += [
    (CLUSTER, "host 127.0.0.1 does not go with rollout.sglang.placement ray and ray.address 10.0.0.1:6379"),
    (["rollout.sglang.host=node"], "host node does not go with rollout.sglang.placement local and ray.address None"),
    (
        [*CLUSTER, "rollout.sglang={host: node, num_servers: 4, sync: tensor, placement: ray}"],
        "ray.address 10.0.0.1:6379 spreads num_servers 4 over a cluster's nodes; use placement local, or sync distributed",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), RULES)
def test_a_rule_between_sections_says_its_numbers(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(file, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampling.train_batch_prompts=12", "batch.mini_batch_prompts=6"],
        ["parallel.sequence_parallel=true", "parallel.tensor_parallel=2"],
        [*LONG, "batch.max_tokens=102"],
        ["reward.overlong.penalty=true", "rollout.max_response_tokens=4096"],
        ["algo.old_logprobs=rollout", "algo.tis.mode=mask"],
        ["optimizer.schedule=cosine", "optimizer.decay_updates=10"],
        ["model.overrides={num_hidden_layers: 2}", "model.init=random"],
        ["rollout.group_size=1", "sampling.style=none"],
        ["sampling.style=resample", "sampling.max_samples_per_prompt=16"],
        [*AHEAD, "algo.tis.mode=truncate"],
        [*AHEAD, "algo.old_logprobs=rollout", "sampling.on_full=abort", "sampling.max_in_flight_groups=8"],
        [*KEEP, "sampling.max_in_flight_groups=1536"],
        [*KEEP, *AHEAD, "sampling.max_staleness=2"],
        ["rollout.engine=sglang", "sampling.on_full=keep", "algo.tis.mode=mask"],
        [*CLUSTER, "rollout.sglang.host=node", "rollout.sglang.sync=distributed"],
        ["rollout.sglang.placement=ray", "rollout.sglang.sync=tensor"],
    ],
)
def test_the_remedy_of_each_rule_works(file: Path, overrides: list[str]) -> None:
    load_config(file, overrides)


TEXTS = [
    ("data.answer_pattern", "#### (.+)"),
    ("data.prompt_template", "{prompt} Think step by step."),
    ("data.prompt_template", "Question: {prompt} # show your work"),
    ("data.system_prompt", "End with #### and the number: no more"),
    ("data.system_prompt", "'a' or 'b'"),
    ("data.answer_key", "yes"),
    ("name", "20250101"),
    ("name", "1e5"),
    ("algo.tis.mode", "off"),
    ("rollout.sglang.verify_sync", "off"),
    ("observe.wandb_project", "2025-01-01"),
    ("data.chat_template", "[a].jinja"),
]


@pytest.mark.parametrize(("key", "text"), TEXTS)
def test_a_text_is_taken_as_it_stands(file: Path, key: str, text: str) -> None:
    config: Any = load_config(file, ["data.chat_template=true", f"{key}={text}"])
    for part in key.split("."):
        config = getattr(config, part)
    assert config == text


def test_a_text_may_be_null_and_quotes_around_all_of_it_are_yamls(file: Path) -> None:
    data = load_config(file, ["data.source_key=null", r'data.prompt_template="Q: {prompt}\nA:"']).data
    assert (data.source_key, data.prompt_template) == (None, "Q: {prompt}\nA:")
    assert load_config(file, ["data.source_key='null'"]).data.source_key == "null"


@pytest.mark.parametrize(
    ("value", "template"),
    [("true", True), ("False", False), ("a #1.jinja", "a #1.jinja"), ("null.jinja", "null.jinja")],
)
def test_a_chat_template_is_a_truth_value_or_a_path(file: Path, value: str, template: bool | str) -> None:
    assert load_config(file, [f"data.chat_template={value}"]).data.chat_template == template


def test_files_are_one_path_as_it_stands_or_a_list(file: Path) -> None:
    assert load_config(file, ["data.files=a #1: b.jsonl"]).data.files == ["a #1: b.jsonl"]
    assert load_config(file, ["data.files=[a.jsonl, 20250101]"]).data.files == ["a.jsonl", "20250101"]


def test_a_plain_value_in_a_file_is_text_where_text_belongs(tmp_path: Path) -> None:
    path = written(tmp_path, "name: 20250101", "algo: {tis: {mode: off}}", "eval: {sets: {2024: {files: a.jsonl}}}")
    config = load_config(path)
    assert (config.name, config.algo.tis.mode, list(config.eval.sets)) == ("20250101", "off", ["2024"])


def written(folder: Path, *lines: str) -> Path:
    path = folder / "written.yaml"
    path.write_text("\n".join(["model: {path: x}", *lines]) + "\n", encoding="utf-8")
    if not any(line.startswith("data:") for line in lines):
        path.write_text(path.read_text() + "data: {files: y}\n", encoding="utf-8")
    return path


def test_a_comment_that_cuts_a_text_is_refused_and_others_are_comments(tmp_path: Path) -> None:
    cut = written(tmp_path, "data:", "  files: y  # the file", "  system_prompt: End with #### and the number")
    with pytest.raises(
        ConfigError, match=r"line 4: YAML takes '#### and the number' after data.system_prompt for a com"
    ):
        load_config(cut)
    for gone in ("  answer_pattern: #### (.+)", "  source_key:\n    # no such column"):
        with pytest.raises(ConfigError, match=r"quote the whole text if .* on a line of its own and write null"):
            load_config(written(tmp_path, "data:", "  files: y", gone))
    fine = written(
        tmp_path,
        "# c",
        "name: a # c",
        "seed: 3 # c",
        "data:",
        "  # c",
        "  files: y # c",
        '  answer_pattern: "# (.)" # c',
    )
    config = load_config(fine)
    assert (config.name, config.seed, config.data.answer_pattern) == ("a", 3, "# (.)")


def test_a_key_given_twice_names_both_lines_at_any_depth(tmp_path: Path) -> None:
    for lines, message in (
        (
            ["data: {files: y}", "data:", "  files: z"],
            "written.yaml gives data twice, in lines 2 and 3; keep one of them",
        ),
        (["optimizer:", "  lr: 1e-6", "  lr: 5e-3"], "gives optimizer.lr twice, in lines 3 and 4"),
        (["megatron:", "  a: [{b: 1,", "   b: 2}]"], "gives megatron.a.b twice, in lines 3 and 4"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_config(written(tmp_path, *lines))


def test_an_override_does_not_change_an_alias_of_what_it_changes(tmp_path: Path) -> None:
    path = written(tmp_path, "data: &d", "  files: y", "eval: {sets: {a: *d, b: {<<: *d, limit: 3}}}")
    config = load_config(path, ["data.limit=5"])
    assert (config.data.limit, config.eval.sets["a"].limit, config.eval.sets["b"].limit) == (5, None, 3)


def test_paths_are_expanded_as_by_a_shell(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    overrides = [
        "model.path=~/m",
        "data.files=[$DATA/a.jsonl, x$DATA]",
        "output_dir=${DATA}/runs",
        "data.system_prompt=~ $X",
    ]
    overrides += ["reward.function=~/r.py:f", "data.chat_template=~/t.jinja", "eval.sets={a: {files: ~/e.jsonl}}"]
    overrides += ["rollout.sglang.key_file=~/k", "rollout.sglang.python=~/p", "rollout.sglang.sync_dir=~/s"]
    overrides += ["warm_start={files: [$DATA/w]}"]
    c = load_config(file, overrides)
    assert (c.model.path, c.data.files, c.output_dir) == ("/home/me/m", ["/data/a.jsonl", "x/data"], "/data/runs")
    assert (c.reward.function, c.data.chat_template) == ("/home/me/r.py:f", "/home/me/t.jinja")
    assert (c.eval.sets["a"].files, c.warm_start and c.warm_start.files) == (["/home/me/e.jsonl"], ["/data/w"])
    s = c.rollout.sglang
    assert (s.key_file, s.python, s.sync_dir) == ("/home/me/k", "/home/me/p", "/home/me/s")
    assert c.data.system_prompt == "~ $X"


def test_the_last_of_two_overrides_wins_with_a_word() -> None:
    assert repeated_overrides(["a.b=1", "a.bc=2", "a.b=3", "a={}"]) == [
        "a.b=1 is given, but a.b=3 comes after it and replaces it",
        "a.b=1 is given, but a={} comes after it and replaces it",
        "a.bc=2 is given, but a={} comes after it and replaces it",
        "a.b=3 is given, but a={} comes after it and replaces it",
    ]
    assert repeated_overrides(["a=1", "b=2", "a.c=1"]) == []


def test_a_configuration_cannot_be_changed() -> None:
    config = parse_config(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.algo.clip_high = 0.5
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1


def test_the_dump_reads_back_to_the_same_configuration(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["optimizer.lr=1e-6", "algo.dual_clip=10", "megatron={a: 1}"])
    (tmp_path / "dump.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "dump.yaml") == config
    assert isinstance(config, Config)


def test_a_changed_configuration_leaves_the_one_of_before_readable(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    kept = []
    for rate, step in ((1e-6, 0), (1e-6, 2), (2e-6, 4), (3e-6, 4), (4e-6, 6)):
        kept.append(record_config(load_config(file, [f"optimizer.lr={rate}"]), run, step))
    assert [path and path.name for path in kept] == [
        None, None, "config.step_000004.yaml", "config.step_000004.1.yaml", "config.step_000006.yaml",
    ]  # fmt: skip
    rates = [load_config(path).optimizer.lr for path in [*kept[2:], run / "config.yaml"]]
    assert rates == [1e-6, 2e-6, 3e-6, 4e-6]
    assert len(list(run.iterdir())) == 4
