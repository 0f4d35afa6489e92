"""Shared by the tests of the SGLang engine: a tiny model, engines and servers for it, and plain HTTP."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.rollout.sglang.client.api import Keys
from dapo_mcore.rollout.sglang.client.versions import SGLangVersion, parse_version
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.launch.process import LaunchedServer, stop_servers
from dapo_mcore.rollout.sglang.launch.servers import ServerPlan, start_servers
from dapo_mcore.rollout.sglang.pool.server import PoolSettings
from dapo_mcore.rollout.sglang.sync.sender import Sender
from dapo_mcore.types import Rollout, SamplingParams
from tests.rollout.sglang.fake_server import fake_python

ENVIRONMENT = "DAPO_MCORE_SGLANG"
VOCAB, CONTEXT, STOP = 64, 512, 1
LONG = 400  # tokens of a generation that a test interrupts
SLOW, FAST = 20, 4000  # tokens/s of a fake server while a test interrupts it, and else
# the fake as each version that differs in a rule of versions.py, and the real server
KINDS = ["0.5.17", "0.5.20", "0.5.21", pytest.param("real", marks=pytest.mark.sglang)]


def real_python() -> Path:
    """Return the interpreter of the environment that tools/sglang_cpu/setup.sh made. Skip the test if none is named."""
    folder = os.environ.get(ENVIRONMENT)
    if not folder:
        pytest.skip(f"set {ENVIRONMENT} to the environment that tools/sglang_cpu/setup.sh makes")
    return Path(folder) / "bin/python"


def real_version() -> SGLangVersion:
    """Return the version of SGLang in that environment."""
    ask = "import importlib.metadata; print(importlib.metadata.version('sglang'))"
    return parse_version(subprocess.check_output([real_python(), "-P", "-c", ask], text=True))


def interpreter(kind: str, folder: Path) -> Path:
    """Return the interpreter that serves: of the real SGLang, or of the fake server as version `kind`."""
    return real_python() if kind == "real" else fake_python(folder, kind)


def tiny_config(**changes: Any) -> PretrainedConfig:
    sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    more = dict(num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=False)
    return Qwen2Config(**{**sizes, **more, **changes}, architectures=["Qwen2ForCausalLM"])


def tiny_model(seed: int) -> torch.nn.Module:
    """Return a model whose token distribution is far from uniform and differs for each seed.

    With a standard deviation of 0.15, fp32 itself (also Hugging Face's) is off by 1.1e-5 somewhere in a few thousand tokens.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="eager", dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.1)
    return model.eval().requires_grad_(False)


def weights(seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    return iter(list(tiny_model(seed).named_parameters()))


def settings(python: Path, **changes: Any) -> SGLangConfig:
    """Return settings with short timeouts, so that faults are noticed in seconds."""
    timeouts = dict(health_interval_s=0.5, health_timeout_s=5.0, start_timeout_s=240.0, sync_timeout_s=30.0)
    limits = dict(request_timeout_s=60.0, read_timeout_s=2.0, bucket_mib=1, server_args={"max-total-tokens": 40000})
    return SGLangConfig.model_validate({"python": str(python), "device": "cpu", **timeouts, **limits, **changes})


@contextmanager
def engine(folder: Path, **changes: Any) -> Iterator[SGLangEngine]:
    python = changes.pop("python", None) or fake_python(folder)
    config = changes.pop("config", None) or tiny_config()
    max_lag, progress, nodes = changes.pop("max_lag", 0), changes.pop("progress", None), changes.pop("nodes", ())
    relays, texts = changes.pop("relays", None), changes.pop("stop_texts", None)
    made = SGLangEngine(
        settings(python, **{"sync_dir": str(folder), **changes}),
        config,
        stop_token_ids=(STOP,),
        stop_texts=texts,
        dtype=torch.float32,
        folder=folder / "servers",
        max_lag=max_lag,
        progress=progress,
        nodes=nodes,
        relays=relays,
    )
    try:
        yield made
    finally:
        made.close()


def pool_settings(restart_budget: int = 0) -> PoolSettings:
    """Return the limits of a pool without an engine: one request a server, a second for each step."""
    times = dict(health_interval_s=60.0, health_timeout_s=1.0, start_timeout_s=1.0, step_timeout_s=1.0)
    return PoolSettings(max_in_flight=1, weights_timeout_s=1.0, restart_budget=restart_budget, **times)


def params(max_new_tokens: int = 16, temperature: float = 1.0) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_p=1.0, top_k=-1, max_new_tokens=max_new_tokens, seed=3)


def prompts(count: int) -> list[np.ndarray]:
    """Return different prompts. A fake server's response repeats its prompt."""
    return [np.array([3 + i // 60, 3 + i % 60, 2], dtype=np.int32) for i in range(count)]


class Raw:
    """One server by plain HTTP. Each call returns (status, JSON or text)."""

    def __init__(self, url: str, keys: Keys | None = None):
        self.url, self.keys = url, keys or Keys()

    def get(self, path: str, key: str | None = "api") -> tuple[int, Any]:
        return self._call("GET", path, None, key)

    def post(self, path: str, body: Any = None, key: str | None = "admin") -> tuple[int, Any]:
        return self._call("POST", path, body or {}, key)

    def generate(
        self, ids: list[int], max_new_tokens: int = 8, sent: Callable[[], None] = lambda: None, **more: Any
    ) -> tuple[int, Any]:
        law = {"max_new_tokens": max_new_tokens, "ignore_eos": True, **more.pop("law", {})}
        body = {"input_ids": ids, "sampling_params": law, "return_logprob": True, **more}
        return self._call("POST", "/generate", body, "api", sent)

    def pace(self, tokens_per_s: float) -> None:
        """Set the speed of a fake server. A real one refuses the call, which changes nothing."""
        self.post("/fake", {"tokens_per_s": tokens_per_s})

    @cached_property
    def sglang(self) -> SGLangVersion:
        return parse_version(self.get("/server_info")[1]["version"])

    def version(self) -> str:
        return self.get("/model_info")[1]["weight_version"]

    @contextmanager
    def in_flight(self, max_new_tokens: int, **more: Any) -> Iterator[dict[str, Any]]:
        """Keep a generation under way inside the block, with a first token. A fake server is slow until the block ends.

        After the block the yielded dictionary holds the generation's `status` and `answer`.
        """
        box: dict[str, Any] = {}
        sent = threading.Event()

        def ask() -> None:
            with suppress(OSError):  # a server that a test kills
                box["status"], box["answer"] = self.generate([5, 6, 7], max_new_tokens, sent.set, **more)

        self.pace(SLOW)
        thread = threading.Thread(target=ask)
        thread.start()
        assert sent.wait(60)
        self.tokens_later()
        assert not box, "the generation ended before the test began; ask for more tokens"
        yield box
        with suppress(OSError):
            self.pace(FAST)
        thread.join(60)

    def tokens_later(self) -> None:
        """Wait until every request under way has one more token: a request of two tokens that comes after them is answered."""
        assert self.generate([5], 2)[0] == 200

    def at_rest(self) -> None:
        """Wait until the server knows that it is idle. It sends the last answer a moment earlier, and an update in that moment
        kills the real one."""
        wait_for(lambda: self.post("/flush_cache")[0] == 200)

    def _call(
        self, method: str, path: str, body: Any, key: str | None, sent: Callable[[], None] = lambda: None
    ) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        if key and (value := getattr(self.keys, key)):
            headers["Authorization"] = f"Bearer {value}"
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            sent()
            answer = connection.getresponse()
            return answer.status, _decoded(answer.read())
        finally:
            connection.close()


@contextmanager
def bare_server(python: Path, folder: Path, **changes: Any) -> Iterator[Raw]:
    """Start one server without an engine and wait until it is up."""
    plan = ServerPlan.new(settings(python, **changes), tiny_config(), "float32", (STOP,), folder)
    (process,) = start_servers(plan)
    raw = Raw(process.url, plan.keys)
    try:
        wait_for(lambda: process.alive and is_up(raw), 240, process.last_words)
        yield raw
    finally:
        stop_servers([process])


def wait_for(happened: Any, seconds: float = 60.0, otherwise: Any = lambda: "") -> None:
    """Wait for `happened`. `seconds` allow for a busy machine; a test of a time limit measures it itself."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} s: {otherwise()}"
        time.sleep(0.03)


def is_up(raw: Raw) -> bool:
    try:
        return raw.get("/health")[0] == 200
    except OSError:
        return False


def servers(made: SGLangEngine) -> list[Raw]:
    """Return the servers of an engine, in order, for plain HTTP."""
    return [Raw(server.url, server.client.keys) for server in made.pool.servers]


def states(made: SGLangEngine) -> list[str]:
    """Return the state of each server of an engine, in order."""
    return [server.state for server in made.pool.servers]


def processes(made: SGLangEngine) -> list[LaunchedServer]:
    """Return the process of each server that an engine has started, in order."""
    return [server.process for server in made.pool.servers]


def given_by(owner: SGLangEngine, folder: Path) -> dict[str, Any]:
    """Return the settings of another engine on the servers of `owner`, which has its own folder in `folder`."""
    urls, keys = [server.url for server in owner.pool.servers], folder / "servers/keys.json"
    return dict(urls=urls, key_file=str(keys), python=sys.executable)


def sync_by(made: SGLangEngine, sender: Sender[Any]) -> None:
    """Send the weights by another sender from now on, which keeps none for servers that come back."""
    made.sender.close()
    made.sender, made.pool._recovery.reload = sender, None


def order(server: Raw, kind: str, **fault: Any) -> None:
    """Make something go wrong at a fake server; see fake_server.Fault."""
    assert server.post("/fake", {"kind": kind, **fault})[0] == 200


def pace(made: SGLangEngine, tokens_per_s: float) -> None:
    """Set the speed of every fake server that is up."""
    for server in servers(made):
        with suppress(OSError):
            server.pace(tokens_per_s)


def told(server: Raw) -> dict[str, Any]:
    """Return what a fake server has seen and holds."""
    return server.get("/fake")[1]


def bucket_a_tensor(made: SGLangEngine) -> None:
    """Send each tensor in a bucket of its own from now on."""
    made.bucket_bytes = 0


def generate_and_sync_again(
    made: SGLangEngine, asked: list[np.ndarray], law: SamplingParams, sync: Callable[[], None]
) -> list[Rollout]:
    """Return what `generate` returns. Call `sync` whenever the servers have lost the weights, as handover.py does."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(made.generate, asked, law)
        while not wait([future], 0.1).done:
            if made.weights_lost:
                sync()
    return future.result()


def shared_files(pid: int | None = None) -> list[str]:
    """Return the names of the shared memory that torch holds for a process, this one by default."""
    return [path.name for path in Path("/dev/shm").glob(f"torch_{pid or os.getpid()}_*")]


def gathered(made: SGLangEngine, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, each in memory that servers can open without a copy."""
    made.bucket_bytes = made.sender.bucket_bytes = 0
    for name, tensor in weights(seed):
        yield name, made.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode()


def key_file(folder: Path, api: str | None, admin: str | None, mode: int = 0o600) -> str:
    """Write a key file that the run reads for given servers, and return its path."""
    path = folder / "keys.json"
    path.write_text(json.dumps({"api_key": api, "admin_key": admin}))
    path.chmod(mode)
    return str(path)
