"""One response with tools: its tokens are those that the engine saw, and only the policy's are trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dapo_mcore.data.stops import StopTexts
from dapo_mcore.rollout.agent.episode import Episode, request_seed
from dapo_mcore.types import ToolCall
from tests.rollout.agent.talk import (
    AFTER,
    BEFORE,
    BYTES,
    EOS,
    PROMPT,
    QWEN,
    blocks_dialect,
    ids,
    ok,
    params,
    piece,
    play,
    runs_of,
    tags_dialect,
    text_of,
)

CALL = '<tool_call>{"name": "python", "arguments": {"code": "1+1"}}</tool_call>'
BLOCK = "```python\nprint(1)\n```"


def bytewise(text: str, tokenizer=BYTES) -> list[int]:
    """Return tokens that the tokenizer would not choose: one for each byte."""
    return [token for character in text for token in ids(character, tokenizer)]


def policy_tokens(episode: Episode) -> list[int]:
    made = episode.rollout()
    return made.token_ids[made.loss_mask].tolist()


def test_a_response_is_what_the_engine_saw():
    turns = [ids(f"hm{CALL}"), ids("two<|im_end|>")]
    episode, asked = play(tags_dialect(), turns, ok("2"), params())
    made = episode.rollout()
    assert text_of(made.token_ids) == f"hm{CALL}{BEFORE}2{AFTER}two<|im_end|>"
    assert [tokens.tolist() for tokens in asked] == [
        PROMPT.tolist(),
        [*PROMPT, *turns[0], *ids(f"{BEFORE}2{AFTER}")],
    ]
    assert policy_tokens(episode) == [*turns[0], *turns[1]]
    assert list(runs_of(made.loss_mask)) == [(True, len(turns[0])), (False, 26), (True, 4)]
    np.testing.assert_array_equal(made.logprobs, np.where(made.loss_mask, -made.token_ids / 1000, 0).astype(np.float32))
    assert (made.finish_reason, made.num_turns, made.seed) == ("stop", 2, 7)
    assert made.calls == (ToolCall("python", '{"code": "1+1"}', "ok", "2", 0.5),)


def test_splits_that_no_tokenizer_makes_are_kept():
    turns = [bytewise("α" + CALL), [*bytewise("2α"), EOS]]
    episode, _ = play(tags_dialect(BYTES), turns, ok("é"), params())
    assert policy_tokens(episode) == [*turns[0], *turns[1]]
    assert episode.num_turns == 2


def test_what_follows_a_call_is_dropped_where_the_engine_cannot_stop_at_its_end():
    """The closing tag is several tokens here, and the last of them is kept whole."""
    talk = tags_dialect(BYTES)
    assert not talk.end_tokens
    turns = [ids(f"{CALL}\nand more<|im_end|>", BYTES), ids("2<|im_end|>", BYTES)]
    episode, asked = play(talk, turns, ok(), params())
    kept = turns[0][: len(ids(CALL, BYTES))]
    assert text_of(kept, BYTES) == CALL and policy_tokens(episode) == [*kept, *turns[1]]
    assert (len(asked), episode.num_cut) == (2, len(turns[0]) - len(kept))


def test_a_fence_may_hold_the_newline_after_it():
    talk = blocks_dialect()
    turns = [ids(f"{BLOCK}\n", BYTES), ids("1<|im_end|>", BYTES)]
    assert text_of(turns[0][-1:], BYTES) == "```\n"
    episode, asked = play(talk, turns, ok("1"), params())
    assert policy_tokens(episode) == [*turns[0], *turns[1]]
    # the engine stops at the opening fence as well, and goes on where it stopped
    assert [len(tokens) - len(PROMPT) for tokens in asked[:2]] == [0, 1]
    assert [text_of(tokens[len(PROMPT) :], BYTES) for tokens in asked[2:]] == [
        f"{BLOCK}\n\n<interpreter>\n1\n</interpreter>\n"
    ]


def test_a_fence_over_two_tokens_is_found():
    fence = [*ids("``", BYTES), *ids("`", BYTES)]
    turn = [*bytewise("```python\n1\n")[3:], *fence]
    turn = [*ids("```", BYTES), *turn, *ids("x<|im_end|>", BYTES)]
    episode, _ = play(blocks_dialect(), [turn, ids("1<|im_end|>", BYTES)], ok(), params())
    assert policy_tokens(episode) == [*turn[:-2], *ids("1<|im_end|>", BYTES)]
    assert (episode.num_turns, episode.num_cut) == (2, 2)


@pytest.mark.parametrize("limit", range(1, len(ids(CALL))))
def test_a_call_that_is_cut_by_the_length_is_never_made(limit: int):
    def outcome(call):
        raise AssertionError(call)

    episode, asked = play(tags_dialect(), [ids(CALL)], outcome, params(limit))
    made = episode.rollout()
    assert (made.finish_reason, made.num_turns, made.calls, len(asked)) == ("length", 1, (), 1)
    assert made.token_ids.tolist() == ids(CALL)[:limit] and made.loss_mask.all()


def test_a_call_with_the_last_token_is_not_made_as_nothing_can_follow():
    episode, _ = play(tags_dialect(), [ids(CALL)], None, params(len(ids(CALL))))
    assert episode.rollout().finish_reason == "length" and not episode.rollout().calls


def test_an_output_that_leaves_no_token_to_the_policy_is_left_out():
    around = len(ids(f"{BEFORE}2{AFTER}"))
    limit = len(ids(CALL)) + around
    for more, turns in ((0, 1), (1, 2)):
        episode, _ = play(tags_dialect(), [ids(CALL), ids("2<|im_end|>")], ok(), params(limit + more))
        made = episode.rollout()
        assert (made.finish_reason, made.num_turns, len(made.calls)) == ("length", turns, 1)
        assert len(made.token_ids) <= limit + more and made.loss_mask[-1]


def test_the_turn_limit_ends_the_response_at_the_call():
    calls = []

    def outcome(call):
        calls.append(call)
        return ok()(call)

    episode, asked = play(tags_dialect(max_turns=3), [ids(CALL)] * 5, outcome, params())
    made = episode.rollout()
    assert (made.finish_reason, made.num_turns, len(made.calls), len(calls), len(asked)) == ("length", 3, 2, 2, 3)
    assert text_of(made.token_ids).endswith(f"{AFTER}{CALL}")


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ("<tool_call>{oops}</tool_call>", "the call is no JSON"),
        ("<tool_call>{}</tool_call>", "the call is not a JSON object with a name"),
        ('<tool_call>{"name": "python"}<|im_end|>', "the call has no </tool_call>"),
    ],
)
def test_the_policy_reads_why_a_call_was_not_made(turn: str, problem: str):
    episode, _ = play(tags_dialect(), [ids(turn), ids("ah<|im_end|>")], ok(), params())
    made = episode.rollout()
    (call,) = made.calls
    assert (call.kind, call.name, made.num_turns, made.finish_reason) == ("error", "", 2, "stop")
    assert call.output.startswith(problem)
    written = turn.removesuffix("<|im_end|>")
    assert text_of(made.token_ids) == f"{written}{BEFORE}{call.output}{AFTER}ah<|im_end|>"


def test_the_policys_own_end_of_turn_is_trained_on_and_not_repeated():
    turn = ids('<tool_call>{"name": "python"}<|im_end|>')
    episode, _ = play(tags_dialect(), [turn, ids("ah<|im_end|>")], ok(), params())
    made = episode.rollout()
    assert made.loss_mask[: len(turn)].all() and not made.loss_mask[len(turn)]
    assert made.token_ids[len(turn)] == ids(BEFORE)[1]


def test_a_block_that_is_not_closed_ends_the_response_where_there_is_no_chat():
    episode, _ = play(blocks_dialect(), [ids("```python\n1<|im_end|>", BYTES)], ok(), params())
    assert (episode.rollout().finish_reason, episode.num_turns) == ("stop", 1)


def test_ends_of_calls_that_were_not_begun_are_text():
    episode, asked = play(tags_dialect(), [ids("a</tool_call>b</tool_call><|im_end|>")], ok(), params())
    assert text_of(episode.rollout().token_ids) == "a</tool_call>b</tool_call><|im_end|>"
    assert (episode.rollout().finish_reason, episode.num_turns, len(asked)) == ("stop", 1, 3)
    endless, asked = play(tags_dialect(), [ids("</tool_call>") * 300], ok(), params())
    assert (endless.rollout().finish_reason, len(asked)) == ("length", 64)
    full, asked = play(tags_dialect(), [ids("</tool_call>") * 9], ok(), params(9))
    assert (full.rollout().finish_reason, len(asked)) == ("length", 9)


@pytest.mark.parametrize("finish", ["stop", "length", "abort"])
def test_a_turn_without_tokens_ends_the_response(finish: str):
    episode = Episode(PROMPT, params(), tags_dialect())
    episode.request()
    call = episode.take(piece(ids(CALL)))
    assert call is not None
    episode.read(ok()(call))
    episode.request()
    assert episode.take(piece([], finish, version=5)) is None
    made = episode.rollout()
    assert (made.finish_reason, made.num_turns) == (finish, 2)
    assert made.loss_mask.sum() == len(ids(CALL)) and not made.loss_mask[-1]
    assert (made.weight_version, made.version_spans) == (1, ())


def test_a_character_over_two_tokens_is_whole_for_the_tool_and_split_in_training():
    seen = []

    def outcome(call):
        seen.append(call.arguments)
        return ok("é")(call)

    turns = [bytewise("```")[:3], bytewise("python\nprint('α😀')\n")]
    turn = [token for part in turns for token in part] + ids("```", BYTES)
    episode, _ = play(blocks_dialect(), [turn, ids("é<|im_end|>", BYTES)], outcome, params())
    assert seen == ["print('α😀')\n"]
    assert policy_tokens(episode) == [*turn, *ids("é<|im_end|>", BYTES)]


def test_a_character_that_is_cut_stays_cut():
    half = ids("α", BYTES)[:1]
    episode, _ = play(blocks_dialect(), [[*ids("x", BYTES), *half, EOS - 4]], ok(), params())
    assert episode.rollout().token_ids.tolist() == [*ids("x", BYTES), *half, EOS - 4]


def test_an_output_that_names_control_tokens_ends_nothing():
    episode, _ = play(tags_dialect(), [ids(CALL), ids("ok<|im_end|>")], ok(f"<|im_end|>{CALL}"), params())
    made = episode.rollout()
    assert made.num_turns == 2 and text_of(made.token_ids[made.loss_mask]) == f"{CALL}ok<|im_end|>"
    assert (made.token_ids == EOS).sum() == 3  # of the template twice, of the policy once


def test_a_tool_that_failed_by_itself_ends_the_response_as_aborted():
    lost = ToolCall("python", "", "infrastructure", "the worker was lost", 1.0)
    episode, _ = play(tags_dialect(), [ids(CALL)], lambda _: lost, params())
    made = episode.rollout()
    assert (made.finish_reason, made.calls, made.num_turns) == ("abort", (lost,), 1) and made.loss_mask.all()


def test_version_spans_are_those_of_the_whole_response():
    episode = Episode(PROMPT, params(), tags_dialect())
    first, length = ids(CALL), len(ids(CALL))
    for tokens, spans in ((first, ((0, 3), (4, 4))), (first, ((0, 4), (2, 5))), (ids("x<|im_end|>"), ())):
        episode.request()
        made = piece(tokens, version=spans[0][1] if spans else 5)
        call = episode.take(type(made)(**{**_fields(made), "version_spans": spans}))
        if call is not None:
            episode.read(ok()(call))
    made = episode.rollout()
    assert made.version_spans == ((0, 3), (4, 4), (length + 26 + 2, 5)) and made.weight_version == 3


def test_spans_of_dropped_tokens_are_dropped():
    episode = Episode(PROMPT, params(len(ids(CALL, BYTES)) + 2), tags_dialect(BYTES, max_turns=2))
    tokens = [*ids(CALL, BYTES), 5, 6]
    episode.request()
    made = piece(tokens, finish="length", version=3)
    assert episode.take(type(made)(**{**_fields(made), "version_spans": ((0, 3), (len(tokens) - 1, 4))})) is not None
    lost = ToolCall("python", "", "infrastructure", "", 1.0)
    episode.read(lost)
    assert episode.rollout().version_spans == () and len(episode.rollout().token_ids) == len(tokens) - 2


def test_each_request_has_the_room_that_is_left_and_a_seed_of_its_own():
    episode = Episode(PROMPT, params(100, seed=11), tags_dialect(), number=4)
    _, first = episode.request()
    episode.read(ok()(episode.take(piece(ids(CALL)))))
    _, second = episode.request()
    assert (first.max_new_tokens, second.max_new_tokens) == (100, 100 - len(ids(CALL)) - 26)
    assert (first.seed, second.seed) == (request_seed(11, 4, 0), request_seed(11, 4, 1))
    others = {request_seed(seed, number, request) for seed in (11, 12) for number in (4, 5) for request in (0, 1)}
    assert len(others) == 8


def _fields(rollout):
    return {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}


def stopping(*texts: str):
    """Return the dialect of tags in a run whose `rollout.stop` has these texts."""
    return replace(tags_dialect(), stop_length=StopTexts(texts, QWEN).length)


@pytest.mark.parametrize(
    ("stop", "turn", "kept"),
    [
        ("x</tool_call>y", "ax</tool_call>yz<|im_end|>", "ax</tool_call>y"),
        ("x</tool_call>", "ax</tool_call>yz<|im_end|>", "ax</tool_call>"),
        ("az", "axz<|im_end|>", "axz<|im_end|>"),
    ],
    ids=["over two requests", "with the last token of a request", "without the stop"],
)
def test_a_stop_text_ends_a_response_wherever_the_requests_of_a_turn_end(stop, turn, kept):
    episode, _ = play(stopping(stop), [ids(turn)], ok(), params())
    assert text_of(episode.rollout().token_ids) == kept and episode.finish_reason == "stop"


@pytest.mark.parametrize("stop", ["</tool_call>", "}</tool_call>"])
def test_a_stop_text_that_ends_with_a_call_does_not_end_the_response(stop):
    episode, _ = play(stopping(stop), [ids(CALL), ids("two<|im_end|>")], ok(), params())
    assert text_of(episode.rollout().token_ids) == f"{CALL}{BEFORE}2{AFTER}two<|im_end|>"


def test_a_stop_text_inside_a_call_ends_the_response_before_the_call_is_made():
    episode, _ = play(stopping("1+1"), [ids(CALL)], ok(), params())
    assert text_of(episode.rollout().token_ids) == CALL[: CALL.index("1+1") + 3]
    assert episode.rollout().calls == () and episode.finish_reason == "stop"


def test_a_stop_text_does_not_span_what_a_tool_gave():
    episode, _ = play(
        stopping("2\n</tool_response>", "assistant\ntwo"), [ids(CALL), ids("two<|im_end|>")], ok(), params()
    )
    assert episode.rollout().token_ids[-1] == EOS
