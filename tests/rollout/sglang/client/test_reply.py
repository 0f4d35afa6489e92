"""Answers of /generate: which fields are read, and which faults make an answer be dropped whole."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from dapo_mcore.data.stops import StopTexts
from dapo_mcore.rollout.sglang.client import reply as replies
from dapo_mcore.rollout.sglang.client.reply import DROP_REASONS, Dropped, VersionRule, decode, max_answer_bytes
from dapo_mcore.types import Rollout
from tests.rollout.spelling import speller

RULE = VersionRule(versions={"1-a": 1, "2-b": 2, "3-c": 3, "3-d": 3}, current="3-d")
STOP = 1
LAGGING = VersionRule(RULE.versions, RULE.current, max_lag=1)


def read_reply(reply: Any, rule: VersionRule) -> Rollout:
    """Read the answer after a round trip through JSON."""
    return replies.read_reply(decode(json.dumps(reply).encode()), rule, [STOP, 2])


def reply(*spans: tuple[int, int, str], tokens: tuple[int, ...] = (7, 8, 9), **meta: Any) -> dict[str, Any]:
    entries = [[-0.5 * (i + 1), token, None] for i, token in enumerate(tokens)]
    named = [{"start": start, "end": end, "version": version} for start, end, version in spans]
    return {
        "output_ids": list(tokens),
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": tokens[-1] if tokens else None},
            "output_token_logprobs": entries,
            "weight_version": named[-1]["version"] if named else "3-d",
            **({"weight_versions": named} if named else {}),
            **meta,
        },
    }


def test_tokens_and_logprobs_come_from_one_list():
    rollout = read_reply(reply(), RULE)
    assert rollout.token_ids.tolist() == [7, 8, 9] and rollout.token_ids.dtype == np.int32
    assert rollout.logprobs.tolist() == [-0.5, -1.0, -1.5] and rollout.logprobs.dtype == np.float32
    assert rollout.loss_mask.tolist() == [True] * 3
    assert (rollout.finish_reason, rollout.weight_version, rollout.version_spans) == ("stop", 3, ())


def test_a_stop_token_at_the_length_limit_counts_as_stop():
    """SGLang up to 0.5.17 reports `length`, and the reward would treat the response as cut."""
    for end, reason in ((STOP, "stop"), (9, "length")):
        rollout = read_reply(reply(tokens=(7, 8, end), finish_reason={"type": "length", "length": 3}), RULE)
        assert rollout.finish_reason == reason and rollout.token_ids.tolist() == [7, 8, end]


def test_a_response_is_cut_at_its_first_stop_text_with_all_that_belongs_to_its_tokens():
    texts = StopTexts(["*+"], speller(16))
    whole = reply((0, 2, "2-b"), (2, 4, "3-d"), tokens=(8, 9, 10, 9, 10), finish_reason={"type": "length", "length": 5})
    whole["meta_info"]["weight_versions"][1]["end"] = 5
    cut = replies.cut_at_text(read_reply(whole, LAGGING), texts)
    assert (
        cut.token_ids.tolist() == [8, 9, 10] and cut.logprobs.tolist() == [-0.5, -1.0, -1.5] and len(cut.loss_mask) == 3
    )
    assert (cut.finish_reason, cut.weight_version, cut.version_spans) == ("stop", 2, ((0, 2), (2, 3)))
    same = read_reply(reply(), RULE)
    assert replies.cut_at_text(same, texts) is same and replies.cut_at_text(same, None) is same


def test_a_cut_before_newer_weights_leaves_one_version():
    found = read_reply(reply((0, 2, "3-d"), (2, 3, "2-b"), tokens=(9, 10, 7)), LAGGING)
    cut = replies.cut_at_text(found, StopTexts(["*+"], speller(16)))
    assert found.weight_version == 2 and (cut.weight_version, cut.version_spans) == (3, ())


def test_a_single_span_counts_as_no_spans():
    assert read_reply(reply((0, 3, "3-d")), RULE).version_spans == ()


def test_spans_within_max_lag_are_kept_and_the_oldest_version_is_the_samples():
    rollout = read_reply(reply((0, 1, "2-b"), (1, 3, "3-d")), LAGGING)
    assert rollout.weight_version == 2 and rollout.version_spans == ((0, 2), (1, 3))


DROPPED = {
    "aborted": [reply(finish_reason={"type": "abort", "message": "Aborted"})],
    "stale_version": [
        reply(weight_version="2-b"),
        reply(weight_version="3-c"),  # another sync of the same version number holds other weights
    ],
    "unknown_version": [reply(weight_version="default"), reply((0, 3, "9-z"))],
    "mixed_versions": [reply((0, 1, "2-b"), (1, 3, "3-d")), reply((0, 1, "3-c"), (1, 3, "3-d"))],
    "malformed": [
        None,
        [],
        "<html>",
        {},
        {"meta_info": None},
        reply(tokens=()),
        reply(finish_reason={"type": "error"}),
        reply(finish_reason=None),
        reply(output_token_logprobs=[[None, 7, None]] * 3),
        reply(output_token_logprobs=[[float("nan"), t, None] for t in (7, 8, 9)]),
        reply(output_token_logprobs=[[-1.0, t, None] for t in (7, 8, 5)]),
        reply(output_token_logprobs=[[-1.0, 2**40, None]] * 3),
        reply((0, 2, "3-d")),
        reply((1, 3, "3-d")),
        reply((0, 1, "3-d"), (2, 3, "3-d")),
    ],
}


@pytest.mark.parametrize(("reason", "answer"), [(reason, a) for reason, answers in DROPPED.items() for a in answers])
def test_a_faulty_answer_is_dropped_whole_with_its_reason(reason, answer):
    with pytest.raises(Dropped) as caught:
        read_reply(answer, RULE)
    assert caught.value.reason == reason


def test_the_cases_above_cover_every_reason():
    assert set(DROPPED) == set(DROP_REASONS)


def test_weights_beyond_max_lag_or_of_another_sync_of_the_same_version_are_stale():
    for tag in ("1-a", "3-c"):
        with pytest.raises(Dropped, match="stale_version"):
            read_reply(reply((0, 3, tag)), LAGGING)


def test_with_max_lag_an_answer_without_spans_is_dropped():
    with pytest.raises(Dropped, match="unknown_version: the answer does not tell"):
        read_reply(reply(weight_version="3-d"), LAGGING)


def test_an_answer_aborted_before_its_first_token_counts_as_aborted():
    aborted = {"meta_info": {"finish_reason": {"type": "abort", "message": "in the queue"}}}
    with pytest.raises(Dropped, match="aborted: in the queue"):
        read_reply(aborted, RULE)


def answer(*entries: list[Any], **more: Any) -> bytes:
    meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": entries, "weight_version": "1-a", **more}
    return json.dumps({"text": "skipped", "meta_info": meta, "output_ids": [entry[1] for entry in entries]}).encode()


def test_known_fields_are_typed_and_others_are_skipped():
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
        (answer([float("nan"), 7, None]), "malformed"),  # NaN is not JSON
        (
            answer([None, 7, None]),
            r"Expected `float`, got `null` - at `\$\.meta_info\.output_token_logprobs\[0\]\[0\]`",
        ),
        (answer([-0.5, -7, None]), "Expected `int` >= 0"),
        (answer([-0.5, 2**31, None]), r"Expected `int` <= 2147483647"),
        (b'{"meta_info": {"output_token_logprobs": [[-0.5]]}}', "length 2, got 1"),
    ],
)
def test_a_malformed_answer_is_dropped_and_the_error_says_where(raw, told):
    with pytest.raises(Dropped, match=told) as caught:
        decode(raw)
    assert caught.value.reason == "malformed"


def test_max_answer_bytes_has_room_for_the_longest_tokens_and_their_text():
    entry = [-2.2250738585072014e-308, 2**31 - 1, "a token of thirty-odd characters"]
    for num_tokens in (1, 20_000):
        assert len(answer(*[entry] * num_tokens)) * 2 < max_answer_bytes(num_tokens)
