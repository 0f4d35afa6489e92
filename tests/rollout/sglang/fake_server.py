"""A fake SGLang server without a model. test_server_rules.py checks that it follows the same rules as the real one.

A response repeats its prompt, so a test can tell which prompt it belongs to. As a program it takes the arguments that
launch/servers.py gives to Python; `fake_python` makes an interpreter for that. POST /fake orders a fault or sets the speed, so
that a generation lasts as long as a test needs. GET /fake returns what has happened.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.web_urldispatcher import SystemRoute

from dapo_mcore.rollout.sglang.client.versions import (
    FIRST_WITH_CHECKSUMS_ON_CPUS,
    FIRST_WITH_LOST_SCALES,
    FIRST_WITH_SESSIONS,
    parse_version,
)
from tests.rollout.sglang.fake_faults import Faults
from tests.rollout.sglang.fake_options import installed, parsed
from tests.rollout.sglang.fake_scheduler import TICK_S, Scheduler
from tests.rollout.sglang.fake_weights import (
    destroy_group,
    join_group,
    load,
    load_delta,
    load_pairs,
    raw_bytes,
    receive,
    unpickled,
    views,
)

ROOT = Path(__file__).absolute().parents[3]
ADMIN = {
    "/flush_cache", "/abort_request", "/pause_generation", "/continue_generation", "/update_weights_from_disk",
    "/begin_weight_update", "/end_weight_update", "/init_weights_update_group", "/destroy_weights_update_group",
    "/update_weights_from_distributed", "/update_weights_from_tensor", "/release_memory_occupation",
    "/resume_memory_occupation", "/weights_checker",
}  # fmt: skip


def fake_python(
    folder: Path,
    version: str = "0.5.21",
    tokens_per_s: int = 4000,
    start_s: float = 0,
    checksums: bool = False,
    tail: float = 0,
    linger: int = 0,
    keep_alive_s: int = 5,
) -> Path:
    """Return an executable that takes Python's arguments and serves like SGLang `version`, `start_s` after its start.

    checksums     report checksums of the weights in every version, as on a GPU.
    tail          0: responses are as long as they may be. Else lengths are log-normal with this sigma, drawn by the request's
                  seed: half are shorter than an eighth of the limit.
    linger        N > 0: one of N responses, chosen by its request's seed, ends only after a weight update, whatever the speed.
                  Responses of a temperature other than 1 (a test's evaluation) never linger.
    keep_alive_s  time after which an idle connection is closed. SGLang's uvicorn counts it from the last answer, aiohttp also
                  from the opening. So on a busy machine thousands of new connections need more.
    """
    script = folder / f"python-{version}-{tokens_per_s}-{start_s}-{checksums}-{tail}-{linger}-{keep_alive_s}"
    settings = f"FAKE_VERSION={version} FAKE_TOKENS_PER_S={tokens_per_s} FAKE_START_S={start_s}"
    settings += f" FAKE_CHECKSUMS={int(checksums)} FAKE_TAIL={tail} FAKE_LINGER={linger}"
    settings += f" FAKE_KEEP_ALIVE_S={keep_alive_s}"
    run = f'PYTHONPATH="{ROOT}" exec "{sys.executable}" -P -m tests.rollout.sglang.fake_server'
    script.write_text(f'#!/bin/sh\n{settings} {run} "$@"\n')
    script.chmod(0o755)
    return script


def gated(python: Path, gate: Path) -> Path:
    """Return an executable that does what `python` does, but starts no server while the file `gate` exists."""
    script = python.with_name(f"{python.name}-gated")
    wait = f'case "$*" in *launch_server*) while [ -e "{gate}" ]; do sleep 0.05; done;; esac'
    script.write_text(f'#!/bin/sh\n{wait}\nexec "{python}" "$@"\n')
    script.chmod(0o755)
    return script


class FakeServer:
    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        config = json.loads((Path(arguments["model-path"]) / "config.json").read_text())
        self.architectures, self.model_path = config["architectures"], arguments["model-path"]
        self.version = os.environ["FAKE_VERSION"]
        version = parse_version(self.version)
        self.has_sessions = version >= FIRST_WITH_SESSIONS
        self.tells_checksums = version >= FIRST_WITH_CHECKSUMS_ON_CPUS or os.environ["FAKE_CHECKSUMS"] == "1"
        self.needs_scales = "quantization_config" in config and version < FIRST_WITH_LOST_SCALES
        self.layers, self.lacks_scales = config["num_hidden_layers"], False
        self.num_ranks = self.arguments["tp-size"]
        self.told: Counter[str] = Counter()
        limits = config["vocab_size"], config["max_position_embeddings"], arguments["max-total-tokens"]
        speed, tail = float(os.environ["FAKE_TOKENS_PER_S"]), float(os.environ["FAKE_TAIL"])
        self.scheduler = Scheduler(version, *limits, speed, tail, int(os.environ["FAKE_LINGER"]), self.told)
        self.weights: dict[str, Any] = {}
        self.session, self.groups, self.buckets = False, {}, 0
        self.faults = Faults(self.told, lambda: self.scheduler.weight_version)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.guard], client_max_size=2**30)
        app.router.add_route("GET", "/fake", self.tell)
        app.router.add_route("POST", "/fake", self.order)
        for path, handler in {
            "/health": self.health,
            "/model_info": self.model_info,
            "/server_info": self.server_info,
            "/generate": self.scheduler.generate,
            "/flush_cache": self.scheduler.flush,
            "/abort_request": self.scheduler.abort,
            "/pause_generation": self.scheduler.pause,
            "/continue_generation": self.scheduler.resume,
            "/update_weights_from_disk": self.update_from_disk,
            "/init_weights_update_group": self.init_group,
            "/destroy_weights_update_group": self.destroy_group,
            "/update_weights_from_distributed": self.update_from_distributed,
            "/release_memory_occupation": self.release_memory,
            "/resume_memory_occupation": self.resume_memory,
            "/update_weights_from_tensor": self.update_from_tensor,
            "/weights_checker": self.check_weights,
        }.items():
            app.router.add_route("*", path, handler)
        if self.has_sessions:
            app.router.add_post("/begin_weight_update", self.begin)
            app.router.add_post("/end_weight_update", self.end)
        return app

    # keys and faults

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        path = request.path
        if path == "/fake" or path.startswith("/health"):
            return await (self.faults.answer_to(request, handler) if path == "/health" else handler(request))
        known = path in ADMIN and not isinstance(request.match_info.route, SystemRoute)
        key = self.arguments.get("admin-api-key") if known else None
        key = key or self.arguments.get("api-key")
        if key and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await self.faults.answer_to(request, handler)

    async def order(self, request: web.Request) -> web.Response:
        ordered = await request.json()
        if "tokens_per_s" in ordered:
            self.scheduler.speed = ordered["tokens_per_s"]
        else:
            self.faults.order(**ordered)
        return web.json_response({})

    async def tell(self, request: web.Request) -> web.Response:
        sums = {name: float((t.float() if hasattr(t, "float") else t).sum()) for name, t in self.weights.items()}
        told = {
            "weight_version": self.scheduler.weight_version,
            "weights": sums,
            "counts": self.told,
            "pid": os.getpid(),
        }
        groups = {"groups": sorted(self.groups), "released": sorted(self.scheduler.released)}
        now = {"running": len(self.scheduler.running), "session": self.session, **groups}
        return web.json_response({**told, **now})

    # what it reports

    async def health(self, request: web.Request) -> web.Response:
        healthy = self.scheduler.unpaused.is_set()
        await asyncio.sleep(0 if healthy else 0.2)
        return web.Response(status=200 if healthy else 503)

    async def model_info(self, request: web.Request) -> web.Response:
        about = {"model_path": self.model_path, "weight_version": self.scheduler.weight_version}
        return web.json_response({**about, "architectures": self.architectures})

    async def server_info(self, request: web.Request) -> web.Response:
        about = {"version": self.version, "tp_size": self.num_ranks, "pp_size": 1}
        return web.json_response({**about, "model_path": self.arguments["model-path"]})

    # memory

    async def release_memory(self, request: web.Request) -> web.Response:
        if self.scheduler.running and self.scheduler.paused_mode is None:
            os._exit(1)  # as the real one: "should be called only when server is idle"
        self.scheduler.released |= set((await request.json())["tags"])
        if "weights" in self.scheduler.released:
            self.weights, self.lacks_scales = {}, self.needs_scales
        return web.Response()

    async def resume_memory(self, request: web.Request) -> web.Response:
        tags = set((await request.json())["tags"])
        if tags - self.scheduler.released:
            os._exit(1)  # as the real one: KeyError
        self.scheduler.released -= tags
        return web.Response()

    # weights

    async def update_from_disk(self, request: web.Request) -> web.Response:
        body = await request.json()
        files = sorted(Path(body["model_path"]).glob("*.safetensors"))
        while self.scheduler.running and self.scheduler.unpaused.is_set():
            await asyncio.sleep(TICK_S)
        if not files:
            return self.result(False, "Failed to get weights iterator")
        for file in files:
            self.weights |= load(file)
        scales = {f"model.layers.{i}.self_attn.attn.{x}_scale" for i in range(self.layers) for x in "kv"}
        if self.lacks_scales and any(self.weights.get(name) != 1.0 for name in scales):
            print("assert layer.k_scale > 0.0\nAssertionError", file=sys.stderr, flush=True)
            os._exit(1)  # as the real one
        self.loaded(body)
        return self.result(True, "Succeeded to update model weights.")

    async def begin(self, request: web.Request) -> web.Response:
        if self.session:
            return self.result(False, "a weight-update session is already open; call end_weight_update() first")
        self.session, self.buckets = True, 0
        return self.result(True, "Success")

    async def end(self, request: web.Request) -> web.Response:
        if not self.session:
            return self.result(False, "no weight-update session is open; call begin_weight_update() first")
        self.session = False
        return self.result(True, "Success")

    async def init_group(self, request: web.Request) -> web.Response:
        body = await request.json()
        try:
            self.groups[body["group_name"]] = await asyncio.to_thread(join_group, body)
        except RuntimeError as error:
            return self.result(False, f"Failed to initialize custom process group: {error}.")
        return self.result(True, "Succeeded to initialize custom process group.")

    async def destroy_group(self, request: web.Request) -> web.Response:
        group = self.groups.pop((await request.json())["group_name"], None)
        if group is None:
            return self.result(False, "The group to be destroyed does not exist.")
        destroy_group(group)
        return self.result(True, "Succeeded to destroy custom process group.")

    async def update_from_distributed(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.has_sessions and not self.session:
            return self.outside_session("update_weights_from_distributed")
        if body["group_name"] not in self.groups:
            if not self.has_sessions:
                os._exit(1)  # as the real one: an assertion
            return self.result(False, f"Failed to receive weights: Group {body['group_name']} not in []")
        self.count_bucket()
        try:
            received = await asyncio.to_thread(receive, self.groups[body["group_name"]], body)
        except RuntimeError as error:
            return self.result(False, f"Failed to receive weights: {error}")
        try:
            self.load_weights(received.items())
        except (RuntimeError, ValueError) as error:
            return self.result(False, f"Failed to update parameter online: {error}.")
        self.loaded(body)
        return self.result(True, "Succeeded to update parameter online.")

    async def update_from_tensor(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.has_sessions and not self.session:
            return self.outside_session("update_weights_from_tensor")
        handles = body["serialized_named_tensors"][: self.num_ranks]
        if body["load_format"] != "flattened_bucket":
            assert body["load_format"] in self.arguments["custom-weight-loader"], body
            assert [unpickled(handle) for handle in handles] == [[]] * self.num_ranks
            load_delta(self, [])
            return self.result(True, "Success")
        self.count_bucket()
        for handle in handles:
            try:
                self.load_weights(views(handle).items())
            except Exception as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)  # as the real one, whose scheduler ends
        self.loaded(body)
        return self.result(True, "Success")

    def load_weights(self, pairs: Iterable[tuple[str, Any]]) -> None:
        load_pairs(self.weights, pairs)

    def outside_session(self, call: str) -> web.Response:
        return self.result(False, f"{call} must run between begin_weight_update() and end_weight_update()")

    def count_bucket(self) -> None:
        self.buckets += 1
        self.scheduler.torn = True
        if self.faults.take(f"bucket {self.buckets}") is not None:
            os._exit(9)
        self.told["buckets"] += 1

    async def check_weights(self, request: web.Request) -> web.Response:
        if not self.tells_checksums:
            return self.result(False, "Torch not compiled with CUDA enabled")
        sums = {name: hashlib.sha256(raw_bytes(tensor)).hexdigest()[:16] for name, tensor in self.weights.items()}
        return web.json_response({"success": True, "message": "Success.", "ranks": [{"checksums": sums}]})

    def loaded(self, body: dict[str, Any]) -> None:
        if "weights" in self.scheduler.released:
            os._exit(1)  # as the real one on a GPU
        if body.get("flush_cache", True) and not self.scheduler.flushed():
            os._exit(1)  # as the real one: "Cache flush failed after updating weights"
        if self.weights and self.faults.take("weights") is not None:
            last = list(self.weights)[-1]
            self.weights[last] = self.weights[last] + 1
        if body.get("weight_version") is not None and self.faults.take("version") is None:
            self.scheduler.weight_version = body["weight_version"]
            self.scheduler.torn = False

    def result(self, success: bool, message: str) -> web.Response:
        return web.json_response({"success": success, "message": message}, status=200 if success else 400)


def main(argv: list[str]) -> None:
    if argv[:1] == ["-P"] and argv[1].endswith("installed.py"):
        print(json.dumps(installed("--registered" in argv)))
        return
    assert argv[:3] == ["-P", "-m", "sglang.launch_server"], argv
    logging.basicConfig(level=logging.WARNING)
    arguments = parsed(argv[3:])

    time.sleep(float(os.environ["FAKE_START_S"]))
    deaf = "FAKE_DEAF" in os.environ  # ignores SIGTERM, as the real one is slow to end
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    async def made() -> web.Application:
        return FakeServer(arguments).app()

    place = {name: arguments[name] for name in ("host", "port")}
    patience = float(os.environ["FAKE_KEEP_ALIVE_S"])
    manner = dict(handle_signals=not deaf, keepalive_timeout=patience, handler_cancellation=True)
    web.run_app(made(), **place, **manner, print=None)


if __name__ == "__main__":
    main(sys.argv[1:])
