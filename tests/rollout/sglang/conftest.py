"""The servers whose rules are tested: the fake as each version that differs, and the real one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dapo_mcore.rollout.sglang.client.versions import FIRST_WITH_CONTINUED_REQUESTS
from dapo_mcore.rollout.sglang.sync import shared_bucket
from tests.rollout.sglang.serving import KINDS, Raw, bare_server, interpreter


@pytest.fixture(scope="module", params=KINDS)
def server(request, tmp_path_factory) -> Iterator[Raw]:
    folder = tmp_path_factory.mktemp(request.param)
    python = interpreter(request.param, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_HEALTH_CHECK_TIMEOUT", "2")  # how long the real one takes to say that it is not healthy
        with bare_server(python, folder / "servers") as raw:
            yield raw


@pytest.fixture
def resuming(server: Raw) -> Raw:
    """A server on which requests live through updates; why older ones are refused, test_server_rules.py shows at its end."""
    if server.sglang < FIRST_WITH_CONTINUED_REQUESTS:
        pytest.skip("no request lives through an update before SGLang 0.5.21, and a run that needs it is refused")
    return server


@pytest.fixture
def full_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_bucket.os, "posix_fallocate", full)
