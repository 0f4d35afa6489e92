"""Where servers are placed beside the trainer, and how old their weights may be; the engines have tests of their own."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.rollout import build
from dapo_mcore.rollout.sglang.sync import relay
from tests.rollout.sampling.scripted import make_config


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    """Return a function that builds SGLang's engine for 4 trainer processes, and returns what the engine is given."""

    def engine(settings: SGLangConfig, hf_config: object, **options: object) -> SimpleNamespace:
        return SimpleNamespace(settings=settings, **options)

    monkeypatch.setattr("dapo_mcore.rollout.sglang.engine.SGLangEngine", engine)

    def start(
        sampling: dict[str, object] | None = None, deterministic: bool = False, **settings: object
    ) -> SimpleNamespace:
        config = make_config("none", train=1, engine="sglang", **sampling or {})
        rollout = config.rollout.model_copy(update={"sglang": SGLangConfig(**settings)})
        return build.build_engine(
            config.model_copy(update={"rollout": rollout, "deterministic": deterministic}),
            None,
            stop_token_ids=(1,),
            pad_token_id=0,
            num_local_ranks=4,
            progress=NullProgress(),
        )

    return start


@pytest.mark.parametrize(
    ("given", "first"),
    [({}, 4), ({"colocated": True}, 0), ({"first_gpu": 6}, 6), ({"first_gpu": 0, "colocated": True}, 0)],
)
def test_servers_take_the_gpus_after_the_trainers_unless_they_share_or_are_told(given, first, started):
    assert started(**given).settings.first_gpu == first


@pytest.mark.parametrize(("on_full", "max_lag"), [("wait", 0), ("keep", 3)])
def test_only_groups_kept_in_flight_may_meet_newer_weights(on_full, max_lag, started):
    assert started({"on_full": on_full, "max_staleness": 3}).max_lag == max_lag


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cuda", {"mem-fraction-static": 0.8}, {"enable-deterministic-inference": True, "mem-fraction-static": 0.8}),
        ("cuda", {"enable-deterministic-inference": None}, {"enable-deterministic-inference": None}),
        ("cpu", {}, {}),
    ],
)
def test_servers_on_gpus_of_a_deterministic_run_are_told(device, given, expected, started):
    assert started(deterministic=True, device=device, server_args=given).settings.server_args == expected
    assert started(device=device, server_args=given).settings.server_args == given


@pytest.mark.parametrize(
    ("rank", "servers", "parents", "expected"),
    [
        (0, {}, [0, 8, 16], ("Relays", (0, 8, 16))),
        (8, {}, [0, 8, 16], ("Relay", (0, 8, 16))),
        (9, {}, [0, 8, 16], None),
        (16, {"num_servers": 2}, [0, 8, 16], None),  # its node has no server
        (0, {}, [0], None),
        (0, {"sync": "disk"}, [0, 8, 16], None),
        (0, {"placement": "local", "host": "127.0.0.1"}, [0, 8, 16], None),
    ],
)
def test_the_first_rank_of_each_node_with_servers_shares_weights_there(monkeypatch, rank, servers, parents, expected):
    made = []
    monkeypatch.setattr(relay, "RelayGroup", lambda ranks, device, timeout: made.append((tuple(ranks), timeout)))
    monkeypatch.setattr(build.dist, "get_rank", lambda: rank)
    settings = SGLangConfig(**{"placement": "nodes", "host": "node", "num_servers": 4, "sync": "tensor"} | servers)
    config = make_config("none", train=1, engine="sglang")
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"sglang": settings})})
    peer = build.build_peer(config, parents, torch.device("cpu"))
    assert (peer and type(peer).__name__) == (expected and expected[0])
    if expected is not None:
        assert made == [(expected[1], timedelta(minutes=config.parallel.timeout_minutes))]
