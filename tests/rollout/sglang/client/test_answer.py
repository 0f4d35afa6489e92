from __future__ import annotations

import json
from typing import Any

import pytest

from dapo_mcore.rollout.sglang.client.answer import Dropped, decode, longest


def answer(*entries: list[Any], **more: Any) -> bytes:
    meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": entries, "weight_version": "1-a", **more}
    return json.dumps({"text": "skipped", "meta_info": meta, "output_ids": [entry[1] for entry in entries]}).encode()


def test_fields_that_are_read_come_typed_and_others_are_skipped():
    got = decode(answer([-0.5, 7, None], [-1, 9, "text"], e2e_latency=1.5))
    first, second = got["meta_info"].pop("output_token_logprobs")
    assert (first.logprob, first.token) == (-0.5, 7)
    assert second.logprob == -1.0 and isinstance(second.logprob, float)
    assert got == {"meta_info": {"finish_reason": {"type": "stop"}, "weight_version": "1-a"}, "output_ids": [7, 9]}


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "truncated"),
        (b"<html>", "malformed"),
        (b"\xff", "malformed"),
        (answer([-0.5, 7, None])[:-9], "truncated"),
        (answer([float("nan"), 7, None]), "malformed"),  # NaN is no JSON
        (
            answer([None, 7, None]),
            r"Expected `float`, got `null` - at `\$\.meta_info\.output_token_logprobs\[0\]\[0\]`",
        ),
        (answer([-0.5, -7, None]), "Expected `int` >= 0"),
        (answer([-0.5, 2**31, None]), r"Expected `int` <= 2147483647"),
        (b'{"meta_info": {"output_token_logprobs": [[-0.5]]}}', "length 2, got 1"),
    ],
)
def test_an_answer_of_another_form_is_malformed_and_told_where(raw, told):
    with pytest.raises(Dropped, match=told) as caught:
        decode(raw)
    assert caught.value.reason == "malformed"


def test_the_longest_answer_holds_the_longest_tokens_and_a_text_beside_them():
    entry = [-2.2250738585072014e-308, 2**31 - 1, "a token of thirty-odd characters"]
    for num_tokens in (1, 20_000):
        assert len(answer(*[entry] * num_tokens)) * 2 < longest(num_tokens)
