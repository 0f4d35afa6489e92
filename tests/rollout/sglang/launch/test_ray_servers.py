"""Two fake servers in actors of a local Ray cluster, with the same engine and the same faults."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.process.ray_cluster import connect
from tests.rollout.sglang.asserts import all_serve, assert_survives_two_deaths, assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import engine, params, processes, prompts

# not imported here: Ray reads RAY_AUTH_MODE once, while it is imported, and the engine sets it
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="pip install 'dapo_mcore[ray]'")


def test_actors_serve_survive_kill_9_and_end_with_the_engine(tmp_path):
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with engine(tmp_path, placement="ray", num_servers=2) as made:
        assert signal.getsignal(signal.SIGTERM) == on_sigterm
        assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
        assert_survives_two_deaths(made)
        asked = prompts(40)
        import ray

        ray.kill(made.pool.servers[0].process._actor)  # its node is lost, and the server with it
        assert_whole(made.generate(asked, params(16)), asked, 16, version=2)
        all_serve(made)
        pids = [process.pid for process in processes(made)]
    assert not ray.is_initialized()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_error_on_a_node_ends_the_run_with_its_message(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"has SGLang 0\.5\.14, but weight updates need at least 0\.5\.15"),
        engine(tmp_path, placement="ray", python=fake_python(tmp_path, "0.5.14")),
    ):
        pass
    import ray

    assert not ray.is_initialized()


def test_a_cluster_without_a_token_is_refused(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(
        ConfigError, match=r"would run code for anyone who reaches it; start it with RAY_AUTH_MODE=token"
    ):
        connect("10.0.0.1:6379")
