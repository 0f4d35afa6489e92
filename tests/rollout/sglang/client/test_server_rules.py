"""The rules of SGLang's server that the engine relies on, tested on the fake server and on the real one.

The real server, of any version, runs if DAPO_MCORE_SGLANG names its environment. versions.py says what each version must do, and
the fake server runs as each version that differs. Faults are tested on the fake server alone, so those tests are only as good
as this file and test_transfer_rules.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from dapo_mcore.rollout.sglang.client.versions import (
    FIRST_WITH_CHECKSUMS_ON_CPUS,
    FIRST_WITH_CONTINUED_REQUESTS,
    FIRST_WITH_SPANS,
    FIRST_WITH_STOP_AT_LIMIT,
    OLDEST,
)
from tests.rollout.sglang.serving import CONTEXT, KINDS, LONG, VOCAB, Raw, bare_server, interpreter, wait_for, weights


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Return folders of weights: `whole`, in two files, and `partial`, without the norms."""
    folder = tmp_path_factory.mktemp("weights")
    whole = {name: tensor.contiguous() for name, tensor in weights(seed=1)}
    norms = {name for name in whole if "norm" in name}
    parts = {
        "whole": [{n: whole[n] for n in whole if n not in norms}, {n: whole[n] for n in norms}],
        "partial": [{n: whole[n] for n in whole if n not in norms}],
    }
    for name, files in parts.items():
        (folder / name).mkdir()
        for number, tensors in enumerate(files):
            save_file(tensors, folder / name / f"{number:05d}.safetensors")
    return {name: folder / name for name in parts}


def load(server: Raw, folder: Path, version: str | None, **more) -> tuple[int, dict]:
    body = {"model_path": str(folder), "load_format": "safetensors", "weight_version": version, **more}
    return server.post("/update_weights_from_disk", body)


def test_a_server_reports_its_version_its_ranks_and_its_model(server: Raw) -> None:
    info = server.get("/server_info")[1]
    assert server.sglang >= OLDEST and info["tp_size"] == info["pp_size"] == 1
    model = server.get("/model_info")[1]
    assert Path(model["model_path"]).name == "model" and model["architectures"] == ["Qwen2ForCausalLM"]


def test_an_answer_has_tokens_and_logprobs(server: Raw) -> None:
    status, answer = server.generate([5, 6, 7], max_new_tokens=12, rid="mine")
    meta = answer["meta_info"]
    assert status == 200 and meta["id"] == "mine" and meta["prompt_tokens"] == 3
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    assert len(answer["output_ids"]) == 12 and all(entry[0] < 0 for entry in meta["output_token_logprobs"])
    assert meta["finish_reason"]["type"] == "length"


def test_an_answer_names_its_weights_and_from_0_5_19_on_those_of_each_token(server: Raw) -> None:
    meta = server.generate([5, 6, 7], max_new_tokens=12)[1]["meta_info"]
    assert meta["weight_version"] == server.version()
    spans = [{"version": meta["weight_version"], "start": 0, "end": 12}]
    assert meta.get("weight_versions") == (spans if server.sglang >= FIRST_WITH_SPANS else None)


def test_a_stop_token_at_the_length_limit_counts_as_stop_from_0_5_18_on(server: Raw) -> None:
    law = {"logit_bias": {"9": 100.0}, "stop_token_ids": [9], "ignore_eos": False}
    _, answer = server.generate([9], max_new_tokens=1, law=law)
    told = "stop" if server.sglang >= FIRST_WITH_STOP_AT_LIMIT else "length"
    assert answer["output_ids"] == [9] and answer["meta_info"]["finish_reason"]["type"] == told


def test_each_kind_of_call_takes_its_own_key_and_health_takes_none(server: Raw) -> None:
    assert server.get("/model_info", key=None)[0] == 401
    assert server.get("/model_info", key="admin")[0] == 401
    assert server.post("/abort_request", {"rid": "x"}, key="api")[0] == 401
    assert server.post("/abort_request", {"rid": "x"}, key="admin")[0] == 200
    assert server.get("/health", key=None)[0] == 200


def test_prompts_that_are_empty_or_too_long_are_refused_with_400(server: Raw) -> None:
    status, answer = server.generate([5] * (CONTEXT + 1))
    assert status == 400 and f"longer than the model's context length ({CONTEXT}" in answer["error"]["message"]
    assert server.generate([])[0] == 400


def test_the_last_two_positions_of_the_context_stay_empty(server: Raw) -> None:
    status, answer = server.generate([5, 6, 7], max_new_tokens=CONTEXT - 3)
    assert status == 200 and answer["meta_info"]["finish_reason"]["type"] == "length"
    assert len(answer["output_ids"]) == CONTEXT - 3 - 2


@pytest.fixture(scope="module", params=KINDS[2:])
def small(request, tmp_path_factory) -> Iterator[Raw]:
    """Start a server whose cache holds 100 tokens."""
    folder = tmp_path_factory.mktemp("small")
    python = interpreter(request.param, folder)
    with bare_server(python, folder / "servers", server_args={"max-total-tokens": 100}) as raw:
        yield raw


def test_a_response_that_fills_the_cache_is_cut_without_an_error(small: Raw) -> None:
    status, answer = small.generate([5, 6, 7], max_new_tokens=200)
    assert status == 200 and answer["meta_info"]["finish_reason"]["type"] == "length"
    assert len(answer["output_ids"]) == 100 - 3 - 2


def test_the_refusal_of_an_impossible_token_reveals_the_vocabulary_size(server: Raw) -> None:
    status, answer = server.generate([5], law={"logit_bias": {"2147483647": 0.0}})
    assert status == 400 and f"[0, {VOCAB - 1}]" in answer["error"]["message"]


def test_a_flush_during_generation_is_refused_with_400(server: Raw) -> None:
    with server.in_flight(LONG):
        assert server.post("/flush_cache")[0] == 400
    server.at_rest()


def test_an_aborted_request_answers_with_the_tokens_it_has(server: Raw) -> None:
    with server.in_flight(LONG, rid="one") as box:
        assert server.post("/abort_request", {"rid": "another"})[0] == 200
        assert server.post("/abort_request", {"rid": "one"})[0] == 200
    meta = box["answer"]["meta_info"]
    assert box["status"] == 200 and meta["finish_reason"]["type"] == "abort"
    assert 0 < len(meta["output_token_logprobs"]) < LONG
    with server.in_flight(LONG, rid="two") as box:
        server.post("/abort_request", {"rid": "tw"})  # the beginning of a rid aborts nothing
    assert box["answer"]["meta_info"]["finish_reason"]["type"] == "length"


def test_a_pause_by_abort_aborts_requests_and_new_ones_wait(server: Raw) -> None:
    with server.in_flight(LONG) as box:
        assert server.post("/pause_generation", {"mode": "abort"})[0] == 200
    assert box["status"] == 200 and box["answer"]["meta_info"]["finish_reason"]["type"] == "abort"
    answers: list = []
    waiting = threading.Thread(target=lambda: answers.append(server.generate([5], 2)))
    waiting.start()
    waiting.join(1)
    assert not answers
    assert server.post("/continue_generation")[0] == 200
    waiting.join(30)
    assert answers[0][1]["meta_info"]["finish_reason"]["type"] == "length"


def test_a_paused_server_looks_unhealthy(server: Raw) -> None:
    server.post("/pause_generation", {"mode": "abort"})
    assert server.get("/health")[0] == 503
    server.post("/continue_generation")
    assert server.get("/health")[0] == 200


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_an_update_during_a_request_gives_it_two_spans(resuming: Raw, checkpoints, mode: str) -> None:
    server = resuming
    before = server.version()
    with server.in_flight(LONG) as box:
        server.post("/pause_generation", {"mode": mode})
        assert server.post("/flush_cache")[0] == (200 if mode == "retract" else 400)
        assert load(server, checkpoints["whole"], mode, flush_cache=mode == "retract")[0] == 200
        server.post("/continue_generation")
    meta = box["answer"]["meta_info"]
    (first, second), middle = meta["weight_versions"], meta["weight_versions"][0]["end"]
    assert first == {"version": before, "start": 0, "end": middle} and 0 < middle < LONG
    assert second == {"version": mode, "start": middle, "end": LONG}
    assert meta["weight_version"] == mode


def test_a_retracted_request_continues_after_any_number_of_updates(resuming: Raw, checkpoints) -> None:
    server = resuming
    before = server.version()
    with server.in_flight(LONG) as box:
        for version in ("second", "third"):
            server.post("/pause_generation", {"mode": "retract"})
            assert load(server, checkpoints["whole"], version)[0] == 200
            server.post("/continue_generation")
            server.tokens_later()
        assert not box, "the generation ended between the updates; ask for more tokens"
    spans = box["answer"]["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == [before, "second", "third"]
    assert [0, *(span["end"] for span in spans)] == [*(span["start"] for span in spans), LONG]
    assert box["answer"]["meta_info"]["finish_reason"]["type"] == "length"
    assert len(box["answer"]["output_ids"]) == LONG


def test_a_request_that_arrives_during_the_update_comes_from_the_new_weights_alone(resuming: Raw, checkpoints) -> None:
    server = resuming
    answers: list = []
    with server.in_flight(LONG):
        server.post("/pause_generation", {"mode": "retract"})
        waiting = threading.Thread(target=lambda: answers.append(server.generate([5], 2)))
        waiting.start()
        waiting.join(1)
        assert not answers
        assert load(server, checkpoints["whole"], "newcomer")[0] == 200
        server.post("/continue_generation")
        waiting.join(30)
    assert [span["version"] for span in answers[0][1]["meta_info"]["weight_versions"]] == ["newcomer"]


@pytest.mark.parametrize("call", ["abort one", "abort all", "pause"])
def test_a_retracted_request_can_be_aborted(server: Raw, call: str) -> None:
    """Needed when the run gives a request up, and when a server that took half an update gets whole weights."""
    path, body = {
        "abort one": ("/abort_request", {"rid": "parked"}),
        "abort all": ("/abort_request", {"rid": "", "abort_all": True}),
        "pause": ("/pause_generation", {"mode": "abort"}),
    }[call]
    with server.in_flight(LONG, rid="parked") as box:
        server.post("/pause_generation", {"mode": "retract"})
        assert server.post(path, body)[0] == 200
        wait_for(lambda: box)
    assert box["status"] == 200 and box["answer"]["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.post("/continue_generation")[0] == 200
    assert server.generate([5, 6], 4)[1]["meta_info"]["finish_reason"]["type"] == "length"


def test_weights_from_disk_set_the_version_if_one_is_given(server: Raw, checkpoints) -> None:
    server.at_rest()
    status, answer = load(server, checkpoints["whole"], "disk-1")
    assert status == 200 and answer["success"] and server.version() == "disk-1"
    assert load(server, checkpoints["whole"], None)[0] == 200 and server.version() == "disk-1"


def test_a_folder_without_weights_is_refused_and_changes_nothing(server: Raw, tmp_path) -> None:
    before = server.version()
    status, answer = load(server, tmp_path / "none", "never")
    assert status == 400 and not answer["success"] and server.version() == before


def test_a_partial_checkpoint_is_loaded_without_an_error(server: Raw, checkpoints) -> None:
    """So the engine checks the stream itself."""
    assert load(server, checkpoints["partial"], "partial")[0] == 200 and server.version() == "partial"


def test_a_paused_server_releases_memory_and_takes_it_back_in_parts(server: Raw, checkpoints) -> None:
    """The turns of a colocated server, see pool/update.py."""
    with server.in_flight(LONG) as box:
        server.post("/pause_generation", {"mode": "abort"})
    assert box["answer"]["meta_info"]["finish_reason"]["type"] == "abort"
    server.at_rest()
    assert server.post("/release_memory_occupation", {"tags": ["cuda_graph", "kv_cache", "weights"]})[0] == 200
    assert server.post("/resume_memory_occupation", {"tags": ["weights"]})[0] == 200
    server.post("/pause_generation", {"mode": "abort"})
    assert load(server, checkpoints["whole"], "woken")[0] == 200 and server.version() == "woken"
    assert server.post("/resume_memory_occupation", {"tags": ["cuda_graph", "kv_cache"]})[0] == 200
    assert server.post("/continue_generation")[0] == 200
    assert server.generate([5, 6], 4)[1]["meta_info"]["weight_version"] == "woken"


def test_last_of_small_taking_back_memory_that_was_not_released_kills_the_server(small: Raw) -> None:
    """So the engine remembers what a server has released. Must stay the last test of `small`."""
    with pytest.raises(OSError):
        small.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
        small.generate([5, 6], 2)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_releasing_memory_during_generation_kills_the_server(kind: str, tmp_path) -> None:
    """So the engine pauses a server before it releases memory."""
    python, killed = interpreter(kind, tmp_path), pytest.raises(OSError)
    with bare_server(python, tmp_path / "servers") as server, killed, server.in_flight(LONG):
        server.post("/release_memory_occupation", {"tags": ["kv_cache"]})
        server.generate([5, 6], 2)


def test_without_cuda_a_server_reports_checksums_only_from_0_5_23_on(server: Raw) -> None:
    status, answer = server.post("/weights_checker", {"action": "checksum"})
    if server.sglang >= FIRST_WITH_CHECKSUMS_ON_CPUS:
        assert status == 200 and answer["ranks"]
    else:
        assert status == 400 and "CUDA" in answer["message"]


def test_from_0_5_21_on_the_cache_can_be_flushed_while_requests_are_retracted(server: Raw, checkpoints) -> None:
    """Before, no request can continue after an update: a flush is refused, and an update that flushes kills the server."""
    resumes = server.sglang >= FIRST_WITH_CONTINUED_REQUESTS
    with server.in_flight(LONG) as box:
        server.post("/pause_generation", {"mode": "retract"})
        assert server.post("/flush_cache")[0] == (200 if resumes else 400)
        server.post("/continue_generation")
    assert box["answer"]["meta_info"]["finish_reason"]["type"] == "length"


def test_last_an_unknown_token_kills_the_server(server: Raw) -> None:
    """So the engine checks prompts itself. Must stay the last test of this file."""
    with pytest.raises(OSError):
        server.generate([VOCAB])
