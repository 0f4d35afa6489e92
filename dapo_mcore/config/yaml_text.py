"""YAML as people who write configurations mean it: text stays text, and whatever YAML would silently lose is an error.

Change here: how YAML is read. The rules, beside those of YAML 1.1:
  - a field of type text takes a plain value as it stands: `name: 20250101`, `mode: off`;
  - `1e-6` is a number, `010` and `1:30` are refused (octal 8 and 90 for YAML 1.1);
  - a key given twice, a comment that cuts or empties a text, and tags are refused, with their lines;
  - aliases are copies, and may not expand beyond a bound.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from dapo_mcore.config.keys import is_prose, is_text, type_below, type_of_items
from dapo_mcore.errors import ConfigError, shortened

_MOST_VALUES = 20_000
_PREFIX = "tag:yaml.org,2002:"
_TAGS = {
    _PREFIX + name for name in ("null", "bool", "int", "float", "timestamp", "str", "seq", "map", "merge", "value")
}
_MERGE = _PREFIX + "merge"
_TEXT = _PREFIX + "str"
_OTHER_BASE = re.compile(r"[-+]?0[0-9_]+|.*:.*")


def read_yaml(text: str, source: str, kind: Any, path: tuple[str, ...] = ()) -> Any:
    """Return the value of a YAML text.

    source  what the text is, for messages
    kind    the type of the value as far as it is known (keys.py), under the dotted key `path`
    Raise ConfigError, with the line, for broken YAML and for what the module's rules refuse.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_expansion(node, source)
        _Checks(text, source).value(node, kind, path)
        return _copied(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{source}{_explain(error)}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of more digits than Python reads
        raise ConfigError(f"{source} is not valid YAML: {shortened(' '.join(str(error).split()), 200)}") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply; a configuration has a few levels") from None


def _explain(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = " ".join(filter(None, (error.context, error.problem)))
    advice = "indent with spaces, not tabs" if "\\t" in problem else "quote text with special characters"
    return f"{place} is not valid YAML: {shortened(problem, 160)}; {advice}"


class _Loader(yaml.SafeLoader):
    """Read `1e-6` as a number, like YAML 1.2. YAML 1.1 reads text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _refuse_expansion(root: Node, source: str) -> None:
    """Raise ConfigError for anchors that contain themselves, or that stand for more values than any configuration has."""
    sizes: dict[int, int | None] = {}

    def size(node: Node) -> int:
        if isinstance(node, ScalarNode):
            return 1
        known = sizes.get(id(node), 0)
        if known is None:
            raise ConfigError(f"{source} line {node.start_mark.line + 1}: the anchor contains itself; write it out")
        if not known:
            sizes[id(node)] = None
            children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] = known = 1 + sum(map(size, children))
        return known

    if size(root) > _MOST_VALUES:
        raise ConfigError(
            f"{source} stands for more than {_MOST_VALUES} values, counting each anchor where it is used; "
            "a configuration has a few hundred"
        )


class _Checks:
    """Walks the nodes beside the sections' types: makes text of what should be, and refuses what would be lost."""

    def __init__(self, text: str, source: str):
        self.text, self.source = text, source
        self.seen: set[tuple[int, tuple[str, ...]]] = set()

    def value(self, node: Node, kind: Any, path: tuple[str, ...]) -> None:
        if (id(node), path) in self.seen:
            return
        self.seen.add((id(node), path))
        if node.tag not in _TAGS:
            self._refuse(node, f"the tag {shortened(node.tag)} is not supported; write plain values")
        if isinstance(node, MappingNode):
            self._mapping(node, kind, path)
        elif isinstance(node, SequenceNode):
            for item in node.value:
                self.value(item, type_of_items(kind), path)
        else:
            self._scalar(node, kind, path)
        if is_text(kind) and not isinstance(node, ScalarNode):
            self._refuse(node, f"{'.'.join(path)} is text, but YAML reads a collection; put the text in quotes")

    def _mapping(self, node: MappingNode, kind: Any, path: tuple[str, ...]) -> None:
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self._refuse(key, "a key must be a word, not a collection")
            line = key.start_mark.line + 1
            name = ".".join([*path, key.value])
            if key.value in lines:
                first = lines[key.value]
                raise ConfigError(
                    f"{self.source} gives {shortened(name)} twice, in lines {first} and {line}; keep one of them"
                )
            lines[key.value] = line
            if key.tag == _MERGE:
                self._merged(value, kind, path)
                continue
            key.tag = _TEXT
            self.value(value, type_below(kind, key.value), (*path, key.value))

    def _merged(self, node: Node, kind: Any, path: tuple[str, ...]) -> None:
        for part in node.value if isinstance(node, SequenceNode) else [node]:
            self.value(part, kind, path)

    def _scalar(self, node: ScalarNode, kind: Any, path: tuple[str, ...]) -> None:
        if node.style is not None:
            return
        if is_text(kind):
            self._refuse_cut(node, kind, path)
            if node.tag != _PREFIX + "null":
                node.tag = _TEXT
        elif node.tag == _PREFIX + "timestamp":
            node.tag = _TEXT
        elif node.tag in (_PREFIX + "int", _PREFIX + "float") and _OTHER_BASE.fullmatch(node.value):
            self._refuse(
                node, f"YAML reads {shortened(node.value)} in base 8 or 60; write it in base 10, or quote it as text"
            )

    def _refuse_cut(self, node: ScalarNode, kind: Any, path: tuple[str, ...]) -> None:
        """Raise ConfigError where a `#` has ended the text: any in prose, which may hold one, else one instead of a value."""
        rest = self.text[node.end_mark.index :]
        cut = re.match(r"[ \t]*\n?[ \t]*#.*", rest) if not node.value else re.match(r"[ \t]+#.*", rest)
        if cut and (not node.value or is_prose(kind)):
            self._refuse(
                node,
                f"YAML takes {shortened(cut.group().strip(), 40)!r} after {'.'.join(path)} for a comment; quote the whole text "
                f"if it belongs to it, else put the comment on a line of its own{'' if node.value else ' and write null'}",
            )

    def _refuse(self, node: Node, problem: str) -> None:
        raise ConfigError(f"{self.source} line {node.start_mark.line + 1}: {problem}")


def _copied(value: Any) -> Any:
    """Return a copy without shared parts, so that an override of one place does not change its aliases."""
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value
