"""The endpoints of one SGLang server as typed calls, for versions 0.5.15 to 0.5.23. Tokens go in, tokens come out.

Change here: when SGLang renames an endpoint or a field. What a version can do is in versions.py. A method has the name of
its endpoint. Every call raises RequestFailed or RequestRefused (http.py).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dapo_mcore.rollout.sglang.client import reply
from dapo_mcore.rollout.sglang.client.http import HttpClient, RequestFailed, RequestRefused
from dapo_mcore.rollout.sglang.client.versions import FIRST_WITH_SESSIONS, SGLangVersion, parse_version
from dapo_mcore.types import SamplingParams

if TYPE_CHECKING:
    import torch

PauseMode = Literal["abort", "retract", "in_place"]
WEIGHT_MEMORY = frozenset({"weights"})
ALL_MEMORY = frozenset({"weights", "kv_cache", "cuda_graph"})
"""SGLang's tags of the device memory that a server can release."""
_NUM_FLUSH_TRIES, _FLUSH_PAUSE_S = 200, 0.05
_NO_TOKEN = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Keys:
    """Bearer keys. SGLang's admin calls take the admin key if there is one. All other calls take the API key."""

    api: str | None = None
    admin: str | None = None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server reports about itself.

    sglang_version  for example (0, 5, 21).
    model_path      as the server sees it.
    num_ranks       processes that hold weights: tensor parallel times pipeline parallel.
    """

    sglang_version: SGLangVersion
    model_path: str
    num_ranks: int


def sampling_params(params: SamplingParams, stop_token_ids: Sequence[int], stop_texts: Sequence[str]) -> dict[str, Any]:
    """Return what /generate calls `sampling_params`, all but the seed. The server looks for texts only if there are any: that needs
    its tokenizer."""
    fields = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "max_new_tokens": params.max_new_tokens,
        "stop_token_ids": list(stop_token_ids),
    }
    return {**fields, "stop": list(stop_texts)} if stop_texts else fields


class ServerClient:
    """Calls one server. `timeout_s` limits every call except generation."""

    def __init__(self, http: HttpClient, url: str, keys: Keys, timeout_s: float):
        self.url = url.rstrip("/")
        self._http, self.keys, self._timeout_s = http, keys, timeout_s
        self._has_sessions = True

    async def facts(self) -> ServerFacts:
        """Ask /server_info and /model_info. Later calls follow the version that the server reports."""
        info, model = await asyncio.gather(self._info("server_info"), self._info("model_info"))
        try:
            version = parse_version(info["version"])
            num_ranks = int(info["tp_size"]) * int(info.get("pp_size", 1))
            facts = ServerFacts(version, model["model_path"], num_ranks)
        except (KeyError, TypeError, ValueError) as error:
            raise RequestFailed(f"{self.url} does not answer like SGLang: {error!r} in its /server_info") from error
        self._has_sessions = version >= FIRST_WITH_SESSIONS
        return facts

    async def vocab_size(self) -> int | None:
        """Return the model's vocabulary size, or None if the version does not reveal it.

        No endpoint reports it, but the error message for an impossible token does.
        """
        bias = {"max_new_tokens": 1, "logit_bias": {str(_NO_TOKEN): 0.0}}
        body = {"input_ids": [0], "sampling_params": bias}
        try:
            await self._http.call("POST", f"{self.url}/generate", body, self.keys.api, self._timeout_s)
        except RequestRefused as refusal:
            found = re.search(r"\[0, (\d+)\]", refusal.message)
            return int(found[1]) + 1 if found else None
        return None

    async def health(self, timeout_s: float) -> bool:
        """Return True if the server can generate. A paused server cannot; a failing one takes up to 20 s to say so."""
        try:
            await self._http.call("GET", f"{self.url}/health", timeout_s=timeout_s)
        except (RequestFailed, RequestRefused):
            return False
        return True

    async def workers(self) -> list[str] | None:
        """Return the URLs that a router sends requests to, or None if it does not report them."""
        try:
            workers = (await self._get("/workers"))["workers"]
            return [re.sub(r"@\d+$", "", worker["url"]).rstrip("/") for worker in workers]  # @n: a data-parallel rank
        except (RequestRefused, KeyError, TypeError):
            return None

    async def generate(self, body: dict[str, Any], timeout_s: float) -> reply.Answer:
        """Return the answer to /generate, for reply.read_reply. Raise Dropped if it is malformed."""
        max_bytes = reply.max_answer_bytes(body["sampling_params"]["max_new_tokens"])
        url, key = f"{self.url}/generate", self.keys.api
        return await self._http.call("POST", url, body, key, timeout_s, decode=reply.decode, max_bytes=max_bytes)

    async def abort_request(self, rid: str = "") -> None:
        """Abort request `rid`, or all requests by default. An aborted request answers HTTP 200 with what it has."""
        await self._admin("/abort_request", {"rid": rid, "abort_all": not rid})

    async def pause_generation(self, mode: PauseMode = "abort") -> None:
        """Stop generation. New requests wait until continue_generation.

        abort     aborts all requests. Returns once the server knows that none is left: it sends the last answer a moment
                  earlier, and would end if it were updated or released in that moment.
        retract   puts requests back in the queue without their KV cache. continue_generation computes the cache again from
                  all their tokens, with the weights that the server then has.
        in_place  keeps requests and their KV cache as they are.
        """
        await self._admin("/pause_generation", {"mode": mode})
        if mode == "abort":
            await self.flush_cache()

    async def continue_generation(self) -> None:
        await self._admin("/continue_generation", {})

    async def flush_cache(self) -> None:
        """Empty the KV cache. A server with requests in work refuses with HTTP 400: retry for ten seconds."""
        for tries_left in reversed(range(_NUM_FLUSH_TRIES)):
            try:
                await self._admin("/flush_cache", {})
                return
            except RequestRefused as refusal:
                if refusal.status != 400 or not tries_left:
                    raise
            await asyncio.sleep(_FLUSH_PAUSE_S)

    async def release_memory_occupation(self, tags: Iterable[str]) -> None:
        """Free device memory; its content is lost. Pause the server first: it would end if it were generating."""
        await self._admin("/release_memory_occupation", {"tags": sorted(tags)})

    async def resume_memory_occupation(self, tags: Iterable[str]) -> None:
        """Take released memory back. The server ends if a tag was not released."""
        await self._admin("/resume_memory_occupation", {"tags": sorted(tags)})

    async def weight_version(self) -> str:
        """Return the name of the server's weights, from /model_info."""
        try:
            return str((await self._info("model_info"))["weight_version"])
        except (KeyError, TypeError) as error:
            raise RequestFailed(f"{self.url}/model_info names no weight_version: {error!r}") from error

    async def weights_checker(self) -> dict[str, str] | None:
        """Return the checksum of each parameter of each rank by `rank:name`, or None if the server cannot report them.

        A server on a CPU cannot before 0.5.23.
        """
        try:
            ranks = (await self._admin("/weights_checker", {"action": "checksum"}))["ranks"]
            by_rank = [(number, rank["checksums"].items()) for number, rank in enumerate(ranks)]
        except (RequestRefused, KeyError, TypeError, AttributeError):
            return None
        return {f"{number}:{name}": value for number, items in by_rank for name, value in items}

    async def update_weights_from_disk(self, folder: str, weight_version: str) -> None:
        """Load a folder of safetensors and flush the KV cache.

        The load format is named, since a server that was started with dummy weights would draw random ones again.
        """
        body = {"model_path": folder, "load_format": "safetensors", "weight_version": weight_version}
        await self._admin("/update_weights_from_disk", {**body, "flush_cache": True})

    async def init_weights_update_group(
        self, name: str, host: str, port: int, rank_offset: int, world_size: int, backend: str
    ) -> None:
        """Make the server's ranks join a process group as ranks `rank_offset` and up. Rank 0 sends."""
        body = {"master_address": host, "master_port": port, "rank_offset": rank_offset, "world_size": world_size}
        await self._admin("/init_weights_update_group", {**body, "group_name": name, "backend": backend})

    async def destroy_weights_update_group(self, name: str) -> None:
        await self._admin("/destroy_weights_update_group", {"group_name": name})

    async def begin_weight_update(self) -> None:
        """Open a session: the server serves none of the partial weights before end_weight_update. A session that an earlier
        update left open is closed first. Does nothing on versions without sessions."""
        try:
            await self._begin_session()
        except RequestRefused:
            await self.end_weight_update()
            await self._begin_session()

    async def update_weights_from_distributed(
        self, tensors: Sequence[tuple[str, torch.Tensor]], group: str, final_version: str | None
    ) -> None:
        """Receive the broadcast of `tensors`, in order.

        final_version  the name of the weights with the last bucket, None before. The last bucket flushes the KV cache.
        """
        body = {
            "names": [name for name, _ in tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "group_name": group,
            "flush_cache": final_version is not None,
            "weight_version": final_version,
        }
        await self._admin("/update_weights_from_distributed", body)

    async def update_weights_from_tensor(
        self, handles: Sequence[str], final_version: str | None, load_format: str = "flattened_bucket"
    ) -> None:
        """Copy weights from shared memory. `handles` has one per rank; final_version as above.

        load_format  or the name of a loader that the server was started with (`--custom-weight-loader`).
        """
        last = {"flush_cache": final_version is not None, "weight_version": final_version}
        body = {"serialized_named_tensors": list(handles), "load_format": load_format, **last}
        await self._admin("/update_weights_from_tensor", body)

    async def end_weight_update(self) -> None:
        if self._has_sessions:
            await self._admin("/end_weight_update", {})

    async def _begin_session(self) -> None:
        if self._has_sessions:
            await self._admin("/begin_weight_update", {"selector": "all"})

    async def _info(self, name: str) -> Any:
        """Return `/server_info` or `/model_info`. Older versions have them as /get_… only."""
        try:
            return await self._get(f"/{name}")
        except RequestRefused as refusal:
            if refusal.status != 404:
                raise
            return await self._get(f"/get_{name}")

    async def _get(self, path: str) -> Any:
        return await self._http.call("GET", self.url + path, None, self.keys.api, self._timeout_s)

    async def _admin(self, path: str, body: dict[str, Any]) -> Any:
        key = self.keys.admin or self.keys.api
        return await self._http.call("POST", self.url + path, body, key, self._timeout_s)
