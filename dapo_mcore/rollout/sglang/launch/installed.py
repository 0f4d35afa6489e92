"""A program that prints as JSON what an environment has of SGLang: its version, its model modules, its server options.

Change here: how SGLang's sources declare an option. The interpreter that runs this may be in another environment, so it
needs the standard library alone. Importing SGLang's own parser takes 5 to 10 s, reading its source a fraction of one;
`--registered` asks the parser.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

_WITHOUT_VALUE = ("store_true'", "StoreTrueAction", "StoreConstAction", "DeprecatedAction")


def declared_options(package: Path) -> dict[str, str]:
    """Return the options that the source of the package `sglang` declares, without dashes, with the kind of each.

    flag  takes no value. pair  takes none, and `--no-…` means false. one  takes a value. many  takes one or more.
    """
    files = [package / "srt/server_args.py", *sorted((package / "srt/arg_groups").rglob("*.py"))]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    found = {name.removeprefix("--"): kind for node in nodes for name, kind in _options(node)}
    return found | {f"no-{name}": "flag" for name, kind in found.items() if kind == "pair"}


def registered_options() -> dict[str, str]:
    """Return the same from SGLang's own parser."""
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    kinds = {}
    for action in parser._actions:
        kind = {0: "flag", None: "one", "?": "one"}.get(action.nargs, "many")
        pair = isinstance(action, argparse.BooleanOptionalAction)
        for name in action.option_strings:
            kinds[name.removeprefix("--")] = "pair" if pair and not name.startswith("--no-") else kind
    return kinds


def _options(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the options of a field `name: A[type, "help" or Arg(…), …]`, or of a call of add_argument."""
    match node:
        case ast.AnnAssign(ast.Name(name), ast.Subscript(ast.Name("A" | "Annotated"), ast.Tuple([kind, *metadata]))):
            calls = [m for m in metadata if isinstance(m, ast.Call) and ast.unparse(m.func) == "Arg"]
            settings = {k.arg: k.value for call in calls for k in call.keywords}
            if "no_cli" not in settings:
                own = _strings(settings.get("cli_name")) or ["--" + name.replace("_", "-")]
                names = own + _strings(settings.get("aliases"))
                yield from dict.fromkeys(names, _kind(ast.unparse(kind), settings)).items()
        case ast.Call(ast.Attribute(attr="add_argument"), args, keywords):
            names = [name for argument in args for name in _strings(argument)]
            yield from dict.fromkeys(names, _kind("", {k.arg: k.value for k in keywords})).items()


def _strings(node: ast.AST | None) -> list[str]:
    """Return the options that are written out below a node."""
    constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)] if node else []
    return [value for value in constants if isinstance(value, str) and value.startswith("--")]


def _kind(type_name: str, settings: dict[str | None, ast.expr]) -> str:
    action = ast.unparse(settings["action"]) if "action" in settings else ""
    if "BooleanOptional" in action:
        return "pair"
    if type_name in ("bool", "Optional[bool]") or action.endswith(_WITHOUT_VALUE):
        return "flag"
    counts = " ".join(ast.unparse(settings[key]) for key in ("nargs", "action_kwargs") if key in settings)
    is_list = "list[" in type_name.lower() and "type_parser" not in settings
    return "many" if is_list or "*" in counts or "+" in counts else "one"


def main() -> None:
    spec = importlib.util.find_spec("sglang")
    if spec is None:
        print(json.dumps({"version": None, "models": [], "options": {}}))
        return
    package = Path(spec.origin).parent
    print(
        json.dumps(
            {
                "version": importlib.metadata.version("sglang"),
                "models": sorted(path.stem for path in (package / "srt/models").glob("*.py")),
                "options": registered_options() if "--registered" in sys.argv else declared_options(package),
            }
        )
    )


if __name__ == "__main__":
    main()
