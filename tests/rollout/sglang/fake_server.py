"""A server that keeps the rules of SGLang's (test_server_rules.py holds it and the real one to them) without a model.

A response repeats its prompt, so a test can tell whose it is. Run as a program it takes the arguments that servers.py
gives to Python; `fake_python` makes the interpreter that does so. POST /fake orders faults, GET /fake tells what happened.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
import os
import pickle
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

TICK_S = 0.02
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
) -> Path:
    """An executable that takes Python's arguments and serves like SGLang `version`, once `start_s` have passed; with CUDA
    where it tells `checksums`.

    tail  0: responses are as long as they may be. Else lengths are log-normal with this sigma, by the request's seed: half
          are shorter than an eighth of that.
    """
    script = folder / f"python-{version}-{tokens_per_s}-{start_s}-{checksums}-{tail}"
    settings = f"FAKE_VERSION={version} FAKE_TOKENS_PER_S={tokens_per_s} FAKE_START_S={start_s}"
    settings += f" FAKE_CHECKSUMS={int(checksums)} FAKE_TAIL={tail}"
    script.write_text(f'#!/bin/sh\n{settings} exec "{sys.executable}" -P "{Path(__file__).absolute()}" "$@"\n')
    script.chmod(0o755)
    return script


@dataclass(eq=False)
class Request:
    rid: str
    tokens: list[int] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    aborted: bool = False


@dataclass
class Fault:
    """What goes wrong in the next `count` uses of `where`: a path, `bucket 5` (counted from 1 in an update), `version`."""

    kind: str
    where: str = "/generate"
    count: int = 1
    value: Any = None


class FakeServer:
    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        config = json.loads((Path(arguments["model-path"]) / "config.json").read_text())
        self.vocab, self.context = config["vocab_size"], config["max_position_embeddings"]
        self.architectures, self.model_path = config["architectures"], arguments["model-path"]
        self.version = os.environ["FAKE_VERSION"]
        self.has_sessions = tuple(map(int, self.version.split(".")[:3])) >= (0, 5, 21)
        self.num_ranks = self.arguments["tp-size"]
        self.speed = int(os.environ["FAKE_TOKENS_PER_S"])
        self.tail = float(os.environ["FAKE_TAIL"])
        self.weight_version, self.weights = "default", {}
        self.running: set[Request] = set()
        self.unpaused = asyncio.Event()
        self.unpaused.set()
        self.paused_mode = None
        self.session, self.groups, self.buckets = False, {}, 0
        self.released: set[str] = set()
        self.faults: list[Fault] = []
        self.told: Counter[str] = Counter()
        self.answer: asyncio.Task[web.Response] | None = None

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.guard], client_max_size=2**30)
        app.router.add_route("GET", "/fake", self.tell)
        app.router.add_route("POST", "/fake", self.order)
        for path, handler in {
            "/health": self.health,
            "/model_info": self.model_info,
            "/server_info": self.server_info,
            "/generate": self.generate,
            "/flush_cache": self.flush,
            "/abort_request": self.abort,
            "/pause_generation": self.pause,
            "/continue_generation": self.resume,
            "/update_weights_from_disk": self.update_from_disk,
            "/init_weights_update_group": self.init_group,
            "/destroy_weights_update_group": self.destroy_group,
            "/update_weights_from_distributed": self.update_from_distributed,
            "/release_memory_occupation": self.release_memory,
            "/resume_memory_occupation": self.resume_memory,
            "/update_weights_from_tensor": self.update_from_tensor,
        }.items():
            app.router.add_route("*", path, handler)
        if self.has_sessions:
            app.router.add_post("/begin_weight_update", self.begin)
            app.router.add_post("/end_weight_update", self.end)
            app.router.add_post("/weights_checker", self.check_weights)
        return app

    # keys and faults

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        path = request.path
        if path == "/fake" or path.startswith("/health"):
            return await (self.misbehave(request, path, handler) if path == "/health" else handler(request))
        key = self.arguments.get("admin-api-key") if path in ADMIN else None
        key = key or self.arguments.get("api-key")
        if key and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await self.misbehave(request, path, handler)

    async def misbehave(self, request: web.Request, where: str, handler: Any) -> web.StreamResponse:
        fault = self.take_fault(where)
        if fault is None:
            return await handler(request)
        if fault.kind == "die":
            await asyncio.sleep(fault.value or 0)
            os._exit(9)
        if fault.kind == "close":
            await asyncio.sleep(0.05)
            request.transport.abort()
        if fault.kind in ("hang", "close"):
            await asyncio.sleep(3600)
        if fault.kind == "status":
            return web.json_response({"error": {"message": "ordered"}}, status=fault.value)
        if fault.kind == "garbage":
            return web.Response(text="<html>")
        if fault.kind == "drip":
            return await self.drip(request)
        if fault.kind == "endless":
            return await self.endless(request)
        if fault.kind == "alike":
            return await self.alike(request, handler)
        assert fault.kind == "edit", fault
        answer = json.loads((await handler(request)).body)
        answer["meta_info"].update(fault.value)
        return web.json_response(answer)

    async def drip(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "4000"})
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.1)

    async def endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 2**20)

    async def alike(self, request: web.Request, handler: Any) -> web.Response:
        """One answer for all, at once: thousands of long ones cost next to nothing."""
        if self.answer is None:
            self.answer = asyncio.create_task(handler(request))
        answer = await asyncio.shield(self.answer)
        return web.Response(body=answer.body, content_type="application/json")

    def take_fault(self, where: str) -> Fault | None:
        for fault in self.faults:
            if fault.where == where and fault.count > 0:
                fault.count -= 1
                self.told[f"fault {fault.kind}"] += 1
                return fault
        return None

    async def order(self, request: web.Request) -> web.Response:
        self.faults.append(Fault(**await request.json()))
        return web.json_response({})

    async def tell(self, request: web.Request) -> web.Response:
        sums = {name: float((t.float() if hasattr(t, "float") else t).sum()) for name, t in self.weights.items()}
        told = {"weight_version": self.weight_version, "weights": sums, "counts": self.told, "pid": os.getpid()}
        groups = {"groups": sorted(self.groups), "released": sorted(self.released)}
        now = {"running": len(self.running), "session": self.session, **groups}
        return web.json_response({**told, **now})

    # what it is

    async def health(self, request: web.Request) -> web.Response:
        healthy = self.unpaused.is_set()
        await asyncio.sleep(0 if healthy else 0.2)
        return web.Response(status=200 if healthy else 503)

    async def model_info(self, request: web.Request) -> web.Response:
        about = {"model_path": self.model_path, "weight_version": self.weight_version}
        return web.json_response({**about, "architectures": self.architectures})

    async def server_info(self, request: web.Request) -> web.Response:
        about = {"version": self.version, "tp_size": self.num_ranks, "pp_size": 1}
        return web.json_response({**about, "model_path": self.arguments["model-path"]})

    # generation

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        ids, law = body["input_ids"], body.get("sampling_params", {})
        if error := self.refusal(ids, law):
            return web.json_response({"error": {"message": error}}, status=400)
        if max(ids) >= self.vocab:
            os._exit(1)  # as the real one: "index out of range in self"
        await self.unpaused.wait()
        work = Request(body.get("rid") or os.urandom(8).hex())
        self.running.add(work)
        self.told["generated"] += 1
        self.told["most_running"] = max(self.told["most_running"], len(self.running))
        try:
            await self.write(work, ids, self.length(law))
        finally:
            self.running.discard(work)
        return web.json_response(self.reply(work, ids, law.get("max_new_tokens", 128)))

    def refusal(self, ids: list[int], law: dict[str, Any]) -> str | None:
        if not ids:
            return "input_ids cannot be empty."
        if len(ids) > self.context:
            return f"The input ({len(ids)} tokens) is longer than the model's context length ({self.context} tokens)."
        outside = [token for token in law.get("logit_bias") or {} if not 0 <= int(token) < self.vocab]
        return f"logit_bias must has keys in [0, {self.vocab - 1}], got {outside[0]}." if outside else None

    def length(self, law: dict[str, Any]) -> int:
        longest = law.get("max_new_tokens", 128)
        if not self.tail:
            return longest
        drawn = random.Random(law["sampling_seed"]).lognormvariate(0, self.tail)
        return max(1, min(longest, int(drawn * longest / 8)))

    async def write(self, work: Request, ids: list[int], count: int) -> None:
        while len(work.tokens) < count and not work.aborted:
            await asyncio.sleep(TICK_S)
            if work.aborted or not self.unpaused.is_set():
                continue
            if self.released:
                os._exit(1)  # as the real one on a GPU: an illegal address
            before = len(work.tokens)
            after = min(count, before + max(1, int(self.speed * TICK_S)))
            work.tokens += [ids[i % len(ids)] for i in range(before, after)]
            if not work.spans or work.spans[-1]["version"] != self.weight_version:
                work.spans.append({"version": self.weight_version, "start": before, "end": after})
            work.spans[-1]["end"] = after

    def reply(self, work: Request, ids: list[int], longest: int) -> dict[str, Any]:
        reason: dict[str, Any] = {"type": "length", "length": longest}
        if work.aborted:
            reason = {"type": "abort", "message": "Aborted"}
        elif len(work.tokens) < longest:
            reason = {"type": "stop", "matched": work.tokens[-1]}
        meta = {
            "id": work.rid,
            "finish_reason": reason,
            "prompt_tokens": len(ids),
            "completion_tokens": len(work.tokens),
            "output_token_logprobs": [[-(token + 1) / self.vocab, token, None] for token in work.tokens],
            "weight_version": work.spans[-1]["version"] if work.spans else self.weight_version,
        }
        if self.has_sessions:  # the versions that report spans
            meta["weight_versions"] = work.spans
        return {"output_ids": work.tokens, "meta_info": meta}

    async def abort(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.told["aborts"] += 1
        for work in self.running:
            work.aborted |= body.get("abort_all", False) or work.rid == body["rid"]
        return web.Response()

    async def pause(self, request: web.Request) -> web.Response:
        self.paused_mode = (await request.json())["mode"]
        self.unpaused.clear()
        while self.paused_mode == "abort" and self.running:
            for work in self.running:
                work.aborted = True
            await asyncio.sleep(TICK_S)
        return web.json_response({"status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        self.unpaused.set()
        self.paused_mode = None
        return web.json_response({"status": "ok"})

    async def flush(self, request: web.Request) -> web.Response:
        done = self.flushed()
        return web.Response(text="Cache flushed.\n" if done else "Flush cache failed.\n", status=200 if done else 400)

    def flushed(self) -> bool:
        return not self.running or self.paused_mode == "retract"

    # memory

    async def release_memory(self, request: web.Request) -> web.Response:
        if self.running and self.paused_mode is None:
            os._exit(1)  # as the real one: "should be called only when server is idle"
        self.released |= set((await request.json())["tags"])
        if "weights" in self.released:
            self.weights = {}
        return web.Response()

    async def resume_memory(self, request: web.Request) -> web.Response:
        tags = set((await request.json())["tags"])
        if tags - self.released:
            os._exit(1)  # as the real one: KeyError
        self.released -= tags
        return web.Response()

    # weights

    async def update_from_disk(self, request: web.Request) -> web.Response:
        body = await request.json()
        files = sorted(Path(body["model_path"]).glob("*.safetensors"))
        while self.running and self.unpaused.is_set():
            await asyncio.sleep(TICK_S)
        if not files:
            return self.result(False, "Failed to get weights iterator")
        for file in files:
            self.weights |= load(file)
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
            return self.result(False, f"Failed to receive weights: Group {body['group_name']} not in []")
        self.count_bucket()
        try:
            self.weights |= await asyncio.to_thread(receive, self.groups[body["group_name"]], body)
        except RuntimeError as error:
            return self.result(False, f"Failed to receive weights: {error}")
        self.loaded(body)
        return self.result(True, "Succeeded to update parameter online.")

    async def update_from_tensor(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.has_sessions and not self.session:
            return self.outside_session("update_weights_from_tensor")
        self.count_bucket()
        assert body["load_format"] == "flattened_bucket", body
        for rank in range(self.num_ranks):
            try:
                self.weights |= await asyncio.to_thread(opened, body["serialized_named_tensors"][rank])
            except Exception:
                os._exit(1)  # as the real one, whose scheduler ends
        self.loaded(body)
        return self.result(True, "Success")

    def outside_session(self, call: str) -> web.Response:
        return self.result(False, f"{call} must run between begin_weight_update() and end_weight_update()")

    def count_bucket(self) -> None:
        self.buckets += 1
        if self.take_fault(f"bucket {self.buckets}") is not None:
            os._exit(9)
        self.told["buckets"] += 1

    async def check_weights(self, request: web.Request) -> web.Response:
        if not int(os.environ["FAKE_CHECKSUMS"]):
            return self.result(False, "Torch not compiled with CUDA enabled")
        sums = {name: hashlib.sha256(raw_bytes(tensor)).hexdigest()[:16] for name, tensor in self.weights.items()}
        return web.json_response({"success": True, "message": "Success.", "ranks": [{"checksums": sums}]})

    def loaded(self, body: dict[str, Any]) -> None:
        if "weights" in self.released:
            os._exit(1)  # as the real one on a GPU
        if body.get("flush_cache", True) and not self.flushed():
            os._exit(1)  # as the real one: "Cache flush failed after updating weights"
        if self.weights and self.take_fault("weights") is not None:
            last = list(self.weights)[-1]
            self.weights[last] = self.weights[last] + 1
        if body.get("weight_version") is not None and self.take_fault("version") is None:
            self.weight_version = body["weight_version"]

    def result(self, success: bool, message: str) -> web.Response:
        return web.json_response({"success": success, "message": message}, status=200 if success else 400)


def load(file: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except (TypeError, AttributeError, KeyError):  # numpy has neither bfloat16 nor float8
        from safetensors.torch import load_file

        return load_file(file)


def raw_bytes(tensor: Any) -> bytes:
    import torch

    return torch.as_tensor(tensor).contiguous().view(torch.uint8).numpy().tobytes()


def join_group(body: dict[str, Any]) -> Any:
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    name, size, timeout = body["group_name"], body["world_size"], timedelta(minutes=30)
    store = dist.TCPStore(body["master_address"], body["master_port"], size, is_master=False)
    prefixed = c10d.PrefixStore(name, store)
    group, _ = c10d._new_process_group_helper(
        size, body["rank_offset"], [], c10d.Backend(body["backend"]), prefixed, group_name=name, timeout=timeout
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group


def destroy_group(group: Any) -> None:
    import torch.distributed as dist

    dist.destroy_process_group(group)


def receive(group: Any, body: dict[str, Any]) -> dict[str, Any]:
    import torch

    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype))
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"])
    }
    for work in [group.broadcast(tensor, 0) for tensor in tensors.values()]:
        work.wait()
    return tensors


class Unpickler(pickle.Unpickler):
    """Admits what SGLang's does, of the things that a bucket may consist of."""

    def find_class(self, module: str, name: str) -> Any:
        rebuilding = {"storage_filename", "typed_storage", "tensor", "cuda_tensor"}
        admitted = {("torch.multiprocessing.reductions", f"rebuild_{what}") for what in rebuilding}
        admitted |= {("torch", "Tensor"), ("torch", "Size"), ("types", "SimpleNamespace")}
        admitted |= {("torch.storage", kind) for kind in ("UntypedStorage", "TypedStorage")}
        admitted |= {("torch", dtype) for dtype in ("uint8", "float32", "bfloat16", "float8_e4m3fn")}
        if (module, name) not in admitted:
            raise RuntimeError(f"Blocked unsafe global ({module}.{name}) during pickle deserialization")
        return super().find_class(module, name)


def opened(handle: str) -> dict[str, Any]:
    content = Unpickler(io.BytesIO(base64.b64decode(handle, validate=True))).load()
    flat = content["flattened_tensor"]
    return {
        m.name: flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape).cpu().clone() for m in content["metadata"]
    }


def main(argv: list[str]) -> None:
    if argv[:2] == ["-P", "-c"]:
        print(json.dumps([os.environ["FAKE_VERSION"], ["llama", "qwen2"]]))
        return
    assert argv[:4] == ["-P", "-m", "sglang.launch_server", "--config"], argv
    logging.basicConfig(level=logging.WARNING)
    arguments = yaml.safe_load(Path(argv[4]).read_text())

    time.sleep(float(os.environ["FAKE_START_S"]))
    deaf = "FAKE_DEAF" in os.environ  # must be killed, as the real one takes its time to end
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    async def made() -> web.Application:
        return FakeServer(arguments).app()

    web.run_app(made(), host=arguments["host"], port=arguments["port"], print=None, handle_signals=not deaf, keepalive_timeout=5, handler_cancellation=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
