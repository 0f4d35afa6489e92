"""The arguments of a call: what the policy wrote, read and held against the tool's JSON schema.

Change here: how a policy may write its arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match

from dapo_mcore.errors import ToolError, shortened

_LONGEST = 300


class Arguments:
    """The schema of one tool's arguments. Raises ToolError if it is no JSON schema."""

    def __init__(self, name: str, schema: dict[str, Any]):
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise ToolError(
                f"tools: {name}.parameters is no JSON schema: {shortened(error.message, _LONGEST)}"
            ) from error
        self.schema = schema
        self._validator = Draft202012Validator(schema)

    def read(self, arguments: Mapping[str, Any] | str) -> dict[str, Any]:
        """Return the arguments. Raise ValueError with one line for the policy if they do not fit.

        A text is a JSON object. For a tool whose only argument is a text, anything else is that argument, as in code blocks.
        """
        found = dict(arguments) if isinstance(arguments, Mapping) else self._parse(arguments)
        if error := best_match(self._validator.iter_errors(found)):
            place = "".join(f"{part}: " for part in error.absolute_path)
            raise ValueError(shortened(f"{place}{error.message}", _LONGEST))
        return found

    def _parse(self, text: str) -> dict[str, Any]:
        only = self._only_text()
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            if only is not None:
                return {only: text}
            raise ValueError(f"they are no JSON: {error}") from None
        if isinstance(found, dict) and (only is None or only in found):
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
