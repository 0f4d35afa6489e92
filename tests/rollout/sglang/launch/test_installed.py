"""Server options as SGLang's sources declare them."""

from __future__ import annotations

from dapo_mcore.rollout.sglang.launch.installed import declared_options

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
