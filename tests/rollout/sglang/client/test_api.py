"""The calls of one server: their keys, what is asked again, and what an answer must hold. An HTTP client that answers at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from dapo_mcore.rollout.sglang.client.api import Keys, ServerClient, ServerFacts, sampling_params
from dapo_mcore.rollout.sglang.client.http import RequestFailed, RequestRefused
from dapo_mcore.types import SamplingParams

URL = "http://a:1"


class Answers:
    """Stands for HttpClient: gives each path its answers in turn, the last one again and again, and keeps what was asked."""

    def __init__(self, **answers: Any):
        self.answers = {f"/{path}": given if isinstance(given, list) else [given] for path, given in answers.items()}
        self.asked: list[tuple[str, str, Any, str | None]] = []

    async def call(self, method: str, url: str, body: Any = None, key: str | None = None, *_: Any, **__: Any) -> Any:
        path = url.removeprefix(URL)
        self.asked.append((method, path, body, key))
        answers = self.answers.get(path, [None])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def paths(self) -> list[str]:
        return [path for _, path, *_ in self.asked]


def refused(status: int, message: str = "no") -> RequestRefused:
    return RequestRefused(URL, status, message)


def ask(http: Answers, call: Callable[[ServerClient], Awaitable[Any]], keys: Keys = Keys("api", "admin")) -> Any:  # noqa: B008
    return asyncio.run(call(ServerClient(http, f"{URL}/", keys, 1.0)))


def served(version: str = "0.5.21", **info: Any) -> dict[str, Any]:
    return {"server_info": {"version": version, "tp_size": 2, **info}, "model_info": {"model_path": "/m"}}


@pytest.mark.parametrize(("keys", "for_admin"), [(Keys("api", "admin"), "admin"), (Keys("api"), "api"), (Keys(), None)])
def test_admin_calls_take_the_admin_key_and_all_others_the_api_key(keys, for_admin):
    http = Answers(model_info={"weight_version": "1-a"})
    assert ask(http, lambda client: client.weight_version(), keys) == "1-a"
    ask(http, lambda client: client.abort_request(), keys)
    everything = {"rid": "", "abort_all": True}
    assert http.asked == [("GET", "/model_info", None, keys.api), ("POST", "/abort_request", everything, for_admin)]


def test_a_request_names_stop_texts_only_if_there_are_any():
    params = SamplingParams(temperature=0.5, top_p=0.9, top_k=-1, max_new_tokens=7, seed=3)
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "max_new_tokens": 7, "stop_token_ids": [2, 5]}
    assert sampling_params(params, (2, 5), ()) == fields
    assert sampling_params(params, (2, 5), ("END",)) == {**fields, "stop": ["END"]}


def test_facts_are_the_version_the_model_and_the_number_of_ranks():
    assert ask(Answers(**served(pp_size=3)), lambda client: client.facts()) == ServerFacts((0, 5, 21), "/m", 6)
    assert ask(Answers(**served()), lambda client: client.facts()).num_ranks == 2


def test_older_versions_are_asked_by_the_older_paths():
    old = {f"get_{name}": answer for name, answer in served("0.5.15").items()}
    http = Answers(**old, server_info=refused(404), model_info=refused(404))
    assert ask(http, lambda client: client.facts()).sglang_version == (0, 5, 15)
    with pytest.raises(RequestRefused):
        ask(Answers(**old, server_info=refused(401), model_info=refused(401)), lambda client: client.facts())


@pytest.mark.parametrize(
    "info", [{}, {"version": "main", "tp_size": 1}, {"version": "0.5.21", "tp_size": None}, "<html>"]
)
def test_a_server_that_is_not_sglang_fails_the_request(info):
    http = Answers(server_info=info, model_info={"model_path": "/m"})
    with pytest.raises(RequestFailed, match=r"http://a:1 does not answer like SGLang: .* in its /server_info"):
        ask(http, lambda client: client.facts())


@pytest.mark.parametrize(("answer", "size"), [(refused(400, "must be in [0, 63], got 2147483647"), 64), ({}, None)])
def test_the_vocabulary_is_read_from_the_refusal_of_an_impossible_token(answer, size):
    assert ask(Answers(generate=answer), lambda client: client.vocab_size()) == size


def test_a_router_names_its_workers_without_their_data_parallel_ranks():
    workers = [{"url": "http://b:1/"}, {"url": "http://b:2@1"}]
    assert ask(Answers(workers={"workers": workers}), lambda client: client.workers()) == ["http://b:1", "http://b:2"]
    for answer in (refused(404), {}, None):
        assert ask(Answers(workers=answer), lambda client: client.workers()) is None


def test_a_flush_waits_while_the_server_works_and_for_nothing_else(monkeypatch):
    pauses_s: list[float] = []

    async def at_once(seconds: float) -> None:
        pauses_s.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", at_once)
    http = Answers(flush_cache=[refused(400), refused(400), None])
    ask(http, lambda client: client.pause_generation())
    assert http.paths == ["/pause_generation", *["/flush_cache"] * 3] and len(pauses_s) == 2
    http = Answers(flush_cache=[refused(401), None])
    with pytest.raises(RequestRefused):
        ask(http, lambda client: client.flush_cache())
    http = Answers(flush_cache=refused(400))
    with pytest.raises(RequestRefused):
        ask(http, lambda client: client.flush_cache())
    assert sum(pauses_s[2:]) == pytest.approx(10, abs=0.1) and len(http.asked) == 200


def test_requests_that_stay_in_the_server_need_no_flush():
    http = Answers()
    ask(http, lambda client: client.pause_generation("retract"))
    assert http.asked == [("POST", "/pause_generation", {"mode": "retract"}, "admin")]


def test_an_update_closes_a_session_that_an_earlier_one_left_open():
    http = Answers(begin_weight_update=[refused(400, "already open"), None])
    ask(http, lambda client: client.begin_weight_update())
    assert http.paths == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]


@pytest.mark.parametrize(("version", "num_calls"), [("0.5.20", 0), ("0.5.21", 2)])
def test_sessions_are_opened_only_on_versions_that_have_them(version, num_calls):
    async def update(client: ServerClient) -> None:
        await client.facts()
        await client.begin_weight_update()
        await client.end_weight_update()

    http = Answers(**served(version))
    ask(http, update)
    assert len([path for path in http.paths if path.endswith("_weight_update")]) == num_calls


def test_a_broadcast_describes_its_tensors_and_only_the_last_flushes():
    bucket = [("a", torch.zeros(2, 3, dtype=torch.bfloat16)), ("b", torch.zeros(()))]
    for version, flushes in ((None, False), ("1-a", True)):
        http = Answers()
        ask(http, lambda client, version=version: client.update_weights_from_distributed(bucket, "group", version))
        ((_, path, body, _),) = http.asked
        described = {"names": ["a", "b"], "dtypes": ["bfloat16", "float32"], "shapes": [[2, 3], []]}
        assert path == "/update_weights_from_distributed"
        assert body == {**described, "group_name": "group", "flush_cache": flushes, "weight_version": version}


def test_checksums_are_told_apart_by_rank_and_none_where_a_server_has_none():
    ranks = [{"checksums": {"w": "x"}}, {"checksums": {"w": "y", "v": "z"}}]
    http = Answers(weights_checker={"ranks": ranks})
    assert ask(http, lambda client: client.weights_checker()) == {"0:w": "x", "1:w": "y", "1:v": "z"}
    for answer in (refused(400), {"ranks": [{}]}, None):
        assert ask(Answers(weights_checker=answer), lambda client: client.weights_checker()) is None


def test_an_answer_without_a_weight_version_fails_the_request():
    for answer in ({}, None):
        with pytest.raises(RequestFailed, match="/model_info names no weight_version"):
            ask(Answers(model_info=answer), lambda client: client.weight_version())


def test_a_server_is_healthy_if_it_says_so_in_time():
    for answer, healthy in ((None, True), (RequestFailed("no answer"), False), (refused(404), False)):
        assert ask(Answers(health=answer), lambda client: client.health(1.0)) == healthy
