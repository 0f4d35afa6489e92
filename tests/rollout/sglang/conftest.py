"""Servers for the tests of SGLang's rules: the fake one as each version that differs, and the real one. And a full /dev/shm."""

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
        patch.setenv("SGLANG_HEALTH_CHECK_TIMEOUT", "2")  # seconds until the real one reports that it is unhealthy
        with bare_server(python, folder / "servers") as raw:
            yield raw


@pytest.fixture
def resuming(server: Raw) -> Raw:
    """Return a server whose requests continue after updates. The end of test_server_rules.py shows why a run refuses older ones."""
    if server.sglang < FIRST_WITH_CONTINUED_REQUESTS:
        pytest.skip(
            "requests continue after an update only from SGLang 0.5.21 on; a run that needs it refuses older versions"
        )
    return server


@pytest.fixture
def full_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_bucket.os, "posix_fallocate", full)
