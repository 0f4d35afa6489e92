"""The command `dapo-mcore`: small subcommands about configurations, rewards and runs.

Change here: add a subcommand by writing its two functions and one line in COMMANDS.
Heavy imports stay inside the functions, so that every subcommand starts quickly.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dapo_mcore.config.file import dump_config, load_config, repeated_overrides
from dapo_mcore.config.foreign_lookup import unknown_arguments
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import ConfigError, DapoError, DataError
from dapo_mcore.process.exit_status import record_failure


class Command(NamedTuple):
    """A subcommand: `add_arguments` adds to its parser, `run` does the work and returns the exit code."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Return its exit code, 2 after an error message for the user on standard error, 130 after Ctrl-C, or 141 if
    nobody reads the output any more, as in `dapo-mcore explain A B | head`."""
    parser = argparse.ArgumentParser(prog="dapo-mcore", description="Tools around a dapo_mcore training run.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    args = _parse(parser, argv)
    try:
        code = args.run(args)
        sys.stdout.flush()  # a closed pipe shows here, not at the interpreter's end
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        return 128 + signal.SIGPIPE
    except DapoError as error:
        print(f"dapo-mcore {args.command}: {error}", file=sys.stderr)
        record_failure(str(error))  # doctor runs under torchrun, too
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments. Overrides may also follow an option: argparse leaves these over."""
    args, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if "overrides" in args and "=" in word and not word.startswith("-")]
    if unknown := [word for word in rest if word not in overrides]:
        parser.error(unknown_arguments(unknown))
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    return args


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="check the parallel layout for N processes (default: the fewest that fit)",
    )
    parser.add_argument(
        "--only-values",
        action="store_true",
        help="check only the values, not files, model and data; the parallel layout only against --processes",
    )
    parser.add_argument("--run-dir", action="store_true", help="check only the values, and print only the run's folder")


def _config(args: argparse.Namespace) -> int:
    """Print the configuration, and notes as YAML comments on standard error: both streams together are valid YAML."""
    if args.processes is not None and args.processes < 1:
        raise ConfigError(f"--processes {args.processes}: a run has at least 1 process; give how many you will start")
    config = load_config(args.file, args.overrides)
    if args.run_dir:
        print(config.run_dir)
        return 0
    notes = repeated_overrides(args.overrides)
    if not args.only_values:
        notes += _dry_run(config, args.processes)
    elif args.processes is not None:
        _check_layout(config, args.processes)
    for note in notes:
        print(f"# {note}", file=sys.stderr)
    print(dump_config(config), end="")
    return 0


def _keys_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="part of a key, another framework's key, or a word of the texts"
    )


def _keys(args: argparse.Namespace) -> int:
    from dapo_mcore.config.key_help import describe_keys

    print(describe_keys(args.words))
    return 0


def _dry_run(config: Config, processes: int | None) -> list[str]:
    import dapo_mcore.process.environment  # noqa: F401  before torch is imported
    from dapo_mcore.config.follows import describe_units
    from dapo_mcore.preflight import check_contents, check_run, describe_run

    check_run(config, processes)
    return [*check_contents(config), *describe_units(config), *describe_run(config)]


def _check_layout(config: Config, processes: int) -> None:
    from dapo_mcore.actor.parallel.mesh import data_parallel_size, expert_data_parallel_size
    from dapo_mcore.rollout.sglang.launch.servers import check_shared_gpus

    data_parallel_size(config.parallel, processes)
    expert_data_parallel_size(config.parallel, processes)
    if config.rollout.engine == "sglang":
        check_shared_gpus(config.rollout.sglang, processes)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a YAML configuration; of the model only config.json is read")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    parser.add_argument("--nodes", type=int, metavar="N", help="default: as many as the configuration needs")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G")
    parser.add_argument("--gpu", type=str.lower, default="h100", choices=("h100", "h200", "b200"))
    parser.add_argument("--suggest", action="store_true", help="rank layouts that fit by the predicted time of a step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan to a file, too")
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=VALUE", help="replace a figure of the plan"
    )
    parser.add_argument("--figures", action="store_true", help="explain every figure behind the plan")


def _plan(args: argparse.Namespace) -> int:
    import dapo_mcore.process.environment  # noqa: F401  before torch is imported
    from dapo_mcore.plan.command import run

    return run(args)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, help="a YAML configuration that is to run here")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings to a file, too")


def _doctor(args: argparse.Namespace) -> int:
    import dapo_mcore.process.environment  # noqa: F401  before torch is imported
    from dapo_mcore.doctor.command import run

    return run(args.file, args.overrides, args.json)


def _replay_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a run with observe.record true")
    parser.add_argument(
        "step", type=int, metavar="STEP", help="repeat from the newest checkpoint before this rollout step to it"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the recorded ones")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the replay's own records (default: RUN.replay)")


def _replay(args: argparse.Namespace) -> int:
    import dapo_mcore.process.environment  # noqa: F401  before torch is imported
    from dapo_mcore.replay.command import run

    return run(args.run_dir, args.step, args.overrides, args.out)


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run's folder; several are compared")
    parser.add_argument("--out", type=Path, help="the PNG to write (default: plot.png in RUN, compare.png for several)")
    parser.add_argument(
        "--bench",
        action="store_true",
        help="RUN are JSON files of pytest -m bench (default: all in kernels/results); one PNG beside each",
    )


def _plot(args: argparse.Namespace) -> int:
    from dapo_mcore.observe.bench_plots import plot_benches
    from dapo_mcore.observe.plots import plot_run, plot_runs

    if args.bench:
        print(*plot_benches(args.runs, args.out), sep="\n")
        return 0
    if not args.runs:
        raise DataError("name the folder of a run, or give --bench for benchmark results")
    several = len(args.runs) > 1
    print(plot_runs(args.runs, args.out or Path("compare.png")) if several else plot_run(args.runs[0], args.out))
    return 0


def _runs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="a run's folder, with records (observe.record=true)")
    parser.add_argument("b", type=Path, metavar="B", help="another run's folder")
    parser.add_argument("--step", type=int, metavar="N", help="compare this rollout step alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison to a file, too")


def _runs(args: argparse.Namespace) -> int:
    import dapo_mcore.process.environment  # noqa: F401  before torch is imported
    from dapo_mcore.replay.report import run

    return run(args.a, args.b, args.step, args.json)


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answer", required=True, metavar="TRUTH", help="the ground truth")
    parser.add_argument("--text", help="the response; standard input when absent")
    parser.add_argument("--function", default="math_dapo", help="as reward.function in the configuration")
    parser.add_argument("--adapter", default="verl", choices=("verl", "trl"), help="as reward.adapter")
    parser.add_argument("--strict-box", action="store_true", help="as reward.strict_box")
    parser.add_argument("--source", default="", help="the row's data source, for functions that look at it")
    parser.add_argument("--kwargs", metavar="JSON", default="{}", help="as reward.kwargs")
    parser.add_argument("--row", metavar="JSON", default="{}", help='the data row: {"prompt": [{…}], "solution": "7"}')
    parser.add_argument(
        "--transcript",
        metavar="JSON",
        help='a response with tools in place of --text: {"turns": ["…"], "calls": [{…}]}',
    )


def _explain(args: argparse.Namespace) -> int:
    from dapo_mcore.reward.attempt import Attempt, joined
    from dapo_mcore.reward.explain import explain, explain_other, read_transcript
    from dapo_mcore.reward.plugins import Rule

    if args.transcript is not None and args.text is not None:
        raise DataError("--text and --transcript are two ways to give the response; leave one out")
    transcript = None if args.transcript is None else read_transcript(args.transcript)
    if transcript:
        text = joined(transcript["turns"])
    else:
        text = sys.stdin.read() if args.text is None else args.text
    columns = _json_object(args.row, "--row must be a JSON object with the row's columns")
    prompt = columns.pop("prompt", "")
    messages = prompt if isinstance(prompt, list) else None
    attempt = Attempt(str(prompt), text, args.answer, args.source, columns, messages=messages, transcript=transcript)
    kwargs = _json_object(args.kwargs, "--kwargs must be a JSON object of arguments")
    block = explain(attempt, Rule(args.function, args.adapter, args.strict_box, kwargs))
    other = explain_other(attempt, args.function)
    print("\n".join([*block, "", *other] if other else block))
    return 0


def _json_object(text: str, rule: str) -> dict[str, Any]:
    """Return the object of an argument. `rule` begins the error for anything else, with the argument's name."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{rule.partition(' ')[0]} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{rule}, not {text!r:.80}")
    return found


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dialect", choices=("verl", "slime", "nemo"), help="whose run it is")
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a bash script (it is read, not run), or a YAML configuration"
    )
    parser.add_argument(
        "-o", dest="out", type=Path, metavar="RUN.yaml", help="write it there; standard output when absent"
    )
    parser.add_argument(
        "--accept",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="lost settings that may change what is optimised, after FILE; the report names them",
    )


def _import(args: argparse.Namespace) -> int:
    from dapo_mcore.foreign.commands.import_run import run

    return run(args.dialect, args.file, args.out, args.accept)


def _tool_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", help="python, calculator, or with --config the name of one of its tools"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML configuration with the section tools")
    parser.add_argument(
        "--call", help="the arguments as a JSON object, else a tool's only text; standard input when absent"
    )


def _tool(args: argparse.Namespace) -> int:
    from dapo_mcore.tools.command import run

    call = sys.stdin.read() if args.call is None else args.call
    if args.call is None and not call:
        raise ConfigError("no call was given: use --call, or write it to standard input")
    return run(args.name, call, args.config, args.overrides)


COMMANDS = (
    Command(
        "import",
        "Turn a run of verl, slime or NeMo-RL into a configuration here, and say what became of each setting; the exit code is 3 if "
        "one that is lost changes what is optimised.",
        _import_arguments,
        _import,
    ),
    Command(
        "config",
        "Check all that can be known before a run, and print the configuration with every default.",
        _config_arguments,
        _config,
    ),
    Command(
        "keys",
        "Say what keys of the configuration mean, with their defaults; without words, all.",
        _keys_arguments,
        _keys,
    ),
    Command(
        "plan",
        "Predict a run's memory and time on GPUs that need not be here; the exit code is 1 if something does not fit.",
        _plan_arguments,
        _plan,
    ),
    Command(
        "doctor",
        "Say what is in use here, what falls back and why, and whether a configuration can run; under torchrun, on all nodes.",
        _doctor_arguments,
        _doctor,
    ),
    Command(
        "replay",
        "Repeat recorded rollout steps and compare them bit by bit; the exit code is 1 if they differ.",
        _replay_arguments,
        _replay,
    ),
    Command(
        "plot", "Plot one run, or compare several, from metrics.jsonl; or benchmark results.", _plot_arguments, _plot
    ),
    Command(
        "explain",
        "Name the first step, and the first thing in it, in which two recorded runs differ; the exit code is 1 if that is no rounding.",
        _runs_arguments,
        _runs,
    ),
    Command("reward-explain", "Say step by step why a response is right or wrong.", _explain_arguments, _explain),
    Command(
        "tool",
        "Make one call of a tool and print what the policy would see; the exit code is 0 also after an error of the policy's or a "
        "time-out, 1 if the tool failed by itself, 2 if no call could be made.",
        _tool_arguments,
        _tool,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
