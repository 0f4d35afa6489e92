"""Values of `server_args` as SGLang's command line reads them, and the options that its sources declare."""

from __future__ import annotations

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang.launch.installed import declared_options
from dapo_mcore.rollout.sglang.launch.interpreter import check_names, command_line

KINDS = {"a": "one", "many": "many", "flag": "flag", "pair": "pair"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"a": -1}, ["--a=-1"]),
        ({"a": "-x y"}, ["--a=-x y"]),
        ({"a": 1e-5}, ["--a=1e-05"]),
        ({"a": True}, ["--a=true"]),
        ({"a": [1, "b"]}, ['--a=[1, "b"]']),
        ({"a": {"k": None}}, ['--a={"k": null}']),
        ({"a": None}, []),
        ({"many": [1, 2.5, "x"]}, ["--many", "1", "2.5", "x"]),
        ({"many": []}, []),
        ({"many": 3}, ["--many=3"]),
        ({"flag": True, "pair": True}, ["--flag", "--pair"]),
        ({"flag": False, "pair": False}, ["--no-pair"]),
    ],
)
def test_a_value_is_written_as_its_option_takes_it(values, words):
    assert command_line(values, KINDS) == words


def test_names_are_held_against_the_options():
    check_names(["a", "pair"], KINDS, "here")
    told = "server_args holds flagg, zzz, but here has no such options; the nearest ones: flagg: flag; zzz: nothing like it"
    with pytest.raises(ConfigError, match=told):
        check_names(["a", "flagg", "zzz"], KINDS, "here")


SOURCE = """
class ServerArgs:
    model_path: A[str, Arg(help="--not-one", aliases=["--model"]), NS("model")]
    tp_size: A[int, "The size.", NS("parallel")] = 1
    hidden: A[bool, Arg(no_cli=True)] = False
    skip: A[bool, "Skips."] = False
    sizes: A[Optional[List[int]], "Sizes."] = None
    parsed: A[Optional[List[int]], Arg(type_parser=json_list)] = None
    strict: A[bool, Arg(action=argparse.BooleanOptionalAction)] = True
    other = 3

    def add_cli_args(parser):
        parser.add_argument("--config", type=str, help="See --model")
        parser.add_argument("--old", "--older", action=DeprecatedStoreTrueAction, new_flag="--skip")
        parser.add_argument("--names", nargs="*")
"""


def test_options_are_read_from_sglangs_source(tmp_path):
    (tmp_path / "srt/arg_groups").mkdir(parents=True)
    (tmp_path / "srt/server_args.py").write_text(SOURCE)
    (tmp_path / "srt/arg_groups/fields.py").write_text("class More:\n    new_one: A[float, 'Help.'] = 0.5\n")
    ones = dict.fromkeys(("model-path", "model", "tp-size", "parsed", "config", "new-one"), "one")
    flags = dict.fromkeys(("skip", "old", "older", "no-strict"), "flag")
    assert declared_options(tmp_path) == {**ones, **flags, "sizes": "many", "names": "many", "strict": "pair"}
