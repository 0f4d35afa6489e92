"""The rules of SGLang's server for weight updates by broadcast and by shared memory. See test_server_rules.py."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import pytest

from dapo_mcore.rollout.sglang.client.versions import FIRST_WITH_SESSIONS
from dapo_mcore.rollout.sglang.sync.process_group import RootRank
from dapo_mcore.rollout.sglang.sync.shared_bucket import SharedBucket
from tests.rollout.sglang.serving import LONG, Raw, wait_for, weights


@contextmanager
def session(server: Raw) -> Iterator[None]:
    """Open a weight update and close it after the block, if the version has sessions."""
    if server.sglang < FIRST_WITH_SESSIONS:
        yield
        return
    assert server.post("/begin_weight_update", {"selector": "all"})[0] == 200
    yield
    assert server.post("/end_weight_update")[0] == 200


def test_a_session_opens_once_and_closes_once_and_a_broadcast_needs_one(server: Raw) -> None:
    begin, end = ("/begin_weight_update", {"selector": "all"}), ("/end_weight_update", {})
    if server.sglang >= FIRST_WITH_SESSIONS:
        assert [server.post(*call)[0] for call in (end, begin, begin, end)] == [400, 200, 400, 200]
        status, answer = receive(server, "nobody", [], None)
        assert status == 400 and "begin_weight_update" in answer["message"]
    else:  # an unknown path is not an admin call, so it takes the API key
        assert [server.post(*call, key="api")[0] for call in (begin, end)] == [404, 404]


def test_leaving_a_group_that_the_server_is_not_in_is_refused(server: Raw) -> None:
    assert server.post("/destroy_weights_update_group", {"group_name": "nobody"})[0] == 400


def test_a_broadcast_sets_the_version_with_the_bucket_that_names_one(server: Raw) -> None:
    server.at_rest()
    root = joined(server)
    before = server.version()
    tensors = [(name, tensor.clone()) for name, tensor in weights(seed=1)]
    with session(server):
        for bucket, version in ((tensors[:5], None), (tensors[5:], "broadcast")):
            send = lambda bucket=bucket: root.broadcast(bucket)  # noqa: E731
            assert in_background(lambda b=bucket, v=version: receive(server, root.name, b, v), send)[0] == 200
            assert server.version() == (version or before)
    assert server.post("/destroy_weights_update_group", {"group_name": root.name})[0] == 200


def test_a_broadcast_during_a_request_gives_it_two_spans(resuming: Raw) -> None:
    server, root = resuming, joined(resuming)
    before = server.version()
    tensors = list(weights(seed=1))
    with server.in_flight(LONG) as box:
        server.post("/pause_generation", {"mode": "retract"})
        with session(server):
            send = lambda: root.broadcast(tensors)  # noqa: E731
            assert in_background(lambda: receive(server, root.name, tensors, "in flight"), send)[0] == 200
        server.post("/continue_generation")
    spans = box["answer"]["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == [before, "in flight"] and spans[1]["end"] == LONG
    assert server.post("/destroy_weights_update_group", {"group_name": root.name})[0] == 200


def test_a_broadcast_that_breaks_off_fails_and_keeps_version_and_session(server: Raw) -> None:
    """Rank 0 gives up. The server notices at once, and can leave the group and join another."""
    root = joined(server)
    before = server.version()
    tensors = list(weights(seed=1))
    with session(server):
        start = time.monotonic()
        give_up = lambda: (time.sleep(0.3), root.close())  # noqa: E731
        status, answer = in_background(lambda: receive(server, root.name, tensors, "never"), give_up)
        assert status == 400 and not answer["success"] and time.monotonic() - start < 20
        assert server.version() == before
    assert server.post("/destroy_weights_update_group", {"group_name": root.name})[0] == 200
    again = joined(server)
    assert server.post("/destroy_weights_update_group", {"group_name": again.name})[0] == 200


def test_joining_a_group_that_is_given_up_is_refused(server: Raw) -> None:
    """The group waits for a second server, which never joins."""
    root = RootRank(f"rules-{secrets.token_hex(4)}", "127.0.0.1", 3, "gloo", timedelta(seconds=30))

    def open_in_vain() -> None:
        with pytest.raises(RuntimeError):
            root.open()

    opening = threading.Thread(target=open_in_vain)
    opening.start()
    status, _ = in_background(lambda: join(server, root), lambda: (wait_for(lambda: is_here(root)), root.close()))
    assert status == 400
    opening.join(20)
    assert not opening.is_alive()


def is_here(root: RootRank) -> bool:
    """Return True if the server has connected to the store. This process has two connections itself."""
    found = [c for c in psutil.net_connections("tcp") if c.laddr.port == root.port and c.status == "ESTABLISHED"]
    return len(found) >= 3


def test_shared_memory_needs_a_session_if_the_version_has_sessions(server: Raw) -> None:
    server.at_rest()
    before = server.version()
    shared = SharedBucket.copy_of(list(weights(seed=1)))
    status, answer = open_tensors(server, shared.handle(), "alone")
    if server.sglang >= FIRST_WITH_SESSIONS:
        assert status == 400 and "begin_weight_update" in answer["message"] and server.version() == before
    else:
        assert status == 200 and server.version() == "alone"
    shared.close()


def test_shared_memory_sets_the_version_with_the_bucket_that_names_one(server: Raw) -> None:
    before = server.version()
    tensors = list(weights(seed=1))
    with session(server):
        for bucket, version in ((tensors[:5], None), (tensors[5:], "tensor")):
            shared = SharedBucket.copy_of(bucket)
            status, answer = open_tensors(server, shared.handle(), version)
            assert status == 200 and answer["success"] and server.version() == (version or before)
            shared.close()


def test_last_a_broadcast_to_a_group_that_the_server_is_not_in_fails_or_kills_it(server: Raw) -> None:
    """So the engine forgets a server's group when it restarts it. Must stay the last test of this file."""
    if server.sglang >= FIRST_WITH_SESSIONS:
        with session(server):
            status, answer = receive(server, "nobody", list(weights(seed=1)), "never")
            assert status == 400 and "nobody" in answer["message"]
    else:
        with pytest.raises(OSError):
            receive(server, "nobody", list(weights(seed=1)), "never")


def joined(server: Raw) -> RootRank:
    """Return rank 0 of a group that the server has joined."""
    root = RootRank(f"rules-{secrets.token_hex(4)}", "127.0.0.1", 2, "gloo", timedelta(seconds=30))
    assert in_background(lambda: join(server, root), root.open)[0] == 200
    return root


def join(server: Raw, root: RootRank) -> tuple[int, Any]:
    place = {"master_address": "127.0.0.1", "master_port": root.port, "rank_offset": 1, "world_size": root.world_size}
    return server.post("/init_weights_update_group", {**place, "group_name": root.name, "backend": "gloo"})


def receive(server: Raw, group: str, tensors: list, version: str | None) -> tuple[int, Any]:
    body = {
        "names": [name for name, _ in tensors],
        "dtypes": ["float32"] * len(tensors),
        "shapes": [list(tensor.shape) for _, tensor in tensors],
        "group_name": group,
        "flush_cache": version is not None,
        "weight_version": version,
    }
    return server.post("/update_weights_from_distributed", body)


def open_tensors(server: Raw, handle: str, version: str | None = None) -> tuple[int, dict]:
    body = {"serialized_named_tensors": [handle], "load_format": "flattened_bucket"}
    return server.post(
        "/update_weights_from_tensor", {**body, "flush_cache": version is not None, "weight_version": version}
    )


def in_background(call: Callable[[], tuple[int, Any]], meanwhile: Callable[[], Any]) -> tuple[int, Any]:
    """Return what `call` returns. It runs in a thread and waits for what `meanwhile` does."""
    box: list[tuple[int, Any]] = []
    thread = threading.Thread(target=lambda: box.append(call()))
    thread.start()
    meanwhile()
    thread.join(60)
    return box[0]
