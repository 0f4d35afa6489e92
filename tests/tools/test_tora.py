"""1,319 public transcripts of ToRA 70B on GSM8K: their code in our sandbox prints what the transcripts recorded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dapo_mcore.config.tools import ToolConfig
from dapo_mcore.tools.result import Kind, ToolResult
from dapo_mcore.tools.toolset import ToolSet
from tests.tools.sandbox.boxes import skip_without_sandbox

_CALL = re.compile(r"```python\n(.*?)```\s*```output\n(.*?)```", re.S)
_TIMEOUT_S = 6.0


def agrees(result: ToolResult, recorded: str) -> bool:
    """Return True if the policy would read the same. ToRA recorded only the last line of an error, and timeouts by name."""
    if "TimeoutError" in recorded:
        return result.kind is Kind.TIMEOUT
    if re.match(r"\w+Error", recorded):
        return result.kind is Kind.ERROR and result.text.splitlines()[-1] == recorded.strip()
    return result.kind is Kind.OK and result.text.strip() == recorded.strip()


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_the_transcripts_code_prints_what_was_recorded(
    every: int, real_data: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    path = real_data("tora/gsm8k_tora_70b.jsonl")
    skip_without_sandbox()
    transcripts = [json.loads(line)["code"][0] for line in path.read_text().splitlines()]
    calls = [call for transcript in transcripts for call in _CALL.findall(transcript)]
    assert (len(transcripts), len(calls)) == (1319, 1318), "one transcript has a call without output"
    calls = calls[::every]
    config = ToolConfig(
        name="python", function="python", timeout_s=_TIMEOUT_S, workers=os.cpu_count(), sandbox={"preload": []}
    )
    with ToolSet([config]) as tools:
        futures = [tools.call(str(n), "python", code) for n, (code, _) in enumerate(calls)]
        results = [future.result(timeout=600) for future in futures]
    different = [
        (result.text, recorded) for result, (_, recorded) in zip(results, calls) if not agrees(result, recorded)
    ]
    with capsys.disabled():
        print(f"\nToRA: {len(calls) - len(different)} of {len(calls)} outputs are the recorded ones")
    assert different == []
