"""The arguments of a call: what the policy wrote, read and held against the tool's JSON schema.

Change here: how a policy may write its arguments.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match

from dapo_mcore.errors import ToolError, shortened

_LONGEST = 300
_TYPES = ("string", "number", "integer", "boolean", "array", "object", "null")


class Arguments:
    """The schema of one tool's arguments. Raises ToolError if it is no JSON schema."""

    def __init__(self, name: str, schema: dict[str, Any]):
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise ToolError(f"tools: {name}.parameters is no JSON schema: {_problem(error)}") from error
        _check_required(name, schema)
        self.schema = schema
        self._validator = Draft202012Validator(schema)

    def read(self, arguments: Mapping[str, Any] | str, is_code: bool = False) -> dict[str, Any]:
        """Return the arguments. Raise ValueError with one line for the policy if they do not fit.

        A text is a JSON object. For a tool whose only argument is a text, anything else is that argument.
        is_code  the text is that argument even if it is a JSON object, as in code blocks.
        """
        found = dict(arguments) if isinstance(arguments, Mapping) else self._parse(arguments, is_code)
        if error := best_match(self._validator.iter_errors(found)):
            place = "".join(f"{part}: " for part in error.absolute_path)
            raise ValueError(shortened(f"{place}{error.message}", _LONGEST))
        return found

    def _parse(self, text: str, is_code: bool) -> dict[str, Any]:
        only = self._only_text()
        if only is not None and is_code:
            return {only: text}
        try:
            found = json.loads(text, strict=False)  # policies write line breaks inside strings
        except (ValueError, RecursionError) as error:
            if only is not None:
                return {only: text}
            raise ValueError(f"they are no JSON: {error}") from None
        if isinstance(found, dict):
            return found
        if only is not None:
            return {only: text}
        raise ValueError(f"they are a JSON {type(found).__name__} instead of an object")

    def _only_text(self) -> str | None:
        """Return the name of the tool's argument if there is one, of type string."""
        properties = self.schema.get("properties", {})
        if len(properties) != 1:
            return None
        ((name, schema),) = properties.items()
        return name if isinstance(schema, dict) and schema.get("type") == "string" else None


def _problem(error: SchemaError) -> str:
    """Return the place in the schema and what is wrong there."""
    place = f"{error.json_path}: "
    if error.path and error.path[-1] == "type" and error.validator == "anyOf":
        return f"{place}{error.instance!r:.80} is no type; the types are {', '.join(_TYPES)}, or a list of them"
    return place + shortened(error.message, _LONGEST)


def _check_required(name: str, schema: Mapping[str, Any]) -> None:
    """Raise ToolError if an argument is required that is not declared: the policy could not know of it, and no call would fit."""
    known = list(schema.get("properties", ()))
    for key in schema.get("required", ()):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ToolError(
                f"tools: {name}.parameters requires {key!r:.80}, which is not among its properties "
                f"({', '.join(known) or 'none'}){hint}"
            )
