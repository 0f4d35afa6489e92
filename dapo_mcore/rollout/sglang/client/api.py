"""One SGLang server's endpoints as typed calls: versions 0.5.15 to 0.5.23, token in, token out.

Change here: when SGLang renames an endpoint or a field; what a version can do stands in versions.py. Each call raises
RequestFailed or RequestRefused (http.py).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dapo_mcore.rollout.sglang.client import answer
from dapo_mcore.rollout.sglang.client.http import HttpClient, RequestFailed, RequestRefused
from dapo_mcore.rollout.sglang.client.versions import FIRST_WITH_SESSIONS, Version, parse_version

if TYPE_CHECKING:
    import torch

PauseMode = Literal["abort", "retract", "in_place"]
WEIGHT_MEMORY = frozenset({"weights"})
ALL_MEMORY = frozenset({"weights", "kv_cache", "cuda_graph"})
"""Tags of device memory that a server gives up and takes back."""
_FLUSH_TRIES, _FLUSH_PAUSE_S = 200, 0.05
_NO_TOKEN = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Keys:
    """Bearer keys. SGLang's admin calls take the admin key alone where there is one, its other calls the API key alone."""

    api: str | None = None
    admin: str | None = None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself.

    version         (0, 5, 21).
    model_path      as the server sees it.
    num_ranks       processes that hold weights: tensor times pipeline parallel.
    weight_version  of /model_info.
    """

    version: Version
    model_path: str
    num_ranks: int
    weight_version: str


class ServerApi:
    """`timeout_s` limits every call but generation."""

    def __init__(self, http: HttpClient, url: str, keys: Keys, timeout_s: float):
        self.url = url.rstrip("/")
        self._http, self._keys, self._timeout_s = http, keys, timeout_s
        self._sessions = True

    async def facts(self) -> ServerFacts:
        """Asks the server who it is; from then on the calls follow its version."""
        info, model = await asyncio.gather(self._info("server_info"), self._info("model_info"))
        try:
            version = parse_version(info["version"])
            ranks = int(info["tp_size"]) * int(info.get("pp_size", 1))
            facts = ServerFacts(version, model["model_path"], ranks, model["weight_version"])
        except (KeyError, TypeError, ValueError) as error:
            raise RequestFailed(f"{self.url} does not answer like SGLang: {error!r} in its /server_info") from error
        self._sessions = version >= FIRST_WITH_SESSIONS
        return facts

    async def vocab_size(self) -> int | None:
        """The model's vocabulary size as an error message gives it away; None where a version words it differently."""
        bias = {"max_new_tokens": 1, "logit_bias": {str(_NO_TOKEN): 0.0}}
        body = {"input_ids": [0], "sampling_params": bias}
        try:
            await self._http.call("POST", f"{self.url}/generate", body, self._keys.api, self._timeout_s)
        except RequestRefused as refusal:
            found = re.search(r"\[0, (\d+)\]", refusal.message)
            return int(found[1]) + 1 if found else None
        return None

    async def healthy(self, timeout_s: float) -> bool:
        """Whether the server generates. It takes up to 20 s to say no, and says no while it is paused."""
        try:
            await self._http.call("GET", f"{self.url}/health", timeout_s=timeout_s)
        except (RequestFailed, RequestRefused):
            return False
        return True

    async def workers(self) -> list[str] | None:
        """The URLs that a router sends requests to; None of one that does not tell."""
        try:
            told = (await self._get("/workers"))["workers"]
            return [re.sub(r"@\d+$", "", worker["url"]).rstrip("/") for worker in told]  # @n: a data-parallel rank
        except (RequestRefused, KeyError, TypeError):
            return None

    async def generate(self, body: dict[str, Any], timeout_s: float) -> answer.Answer:
        """The answer to /generate, for replies.py to read. Raises Dropped when it is malformed."""
        limit = answer.longest(body["sampling_params"]["max_new_tokens"])
        url, key = f"{self.url}/generate", self._keys.api
        return await self._http.call("POST", url, body, key, timeout_s, decode=answer.decode, max_bytes=limit)

    async def abort(self, rid: str = "") -> None:
        """Ends request `rid`, or all requests; they answer HTTP 200 with what they have."""
        await self._admin("/abort_request", {"rid": rid, "abort_all": not rid})

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Stops generation; new requests wait until `resume`.

        abort     ends requests in work: returns once none is left, and the server knows it. It tells the last answer a
                  moment before, and would die of an update or a release in that moment.
        retract   puts them back in the queue without their KV cache; `resume` computes it anew from all their tokens, by
                  the weights of then.
        in_place  leaves them and their KV cache as they are.
        """
        await self._admin("/pause_generation", {"mode": mode})
        if mode == "abort":
            await self.flush()

    async def resume(self) -> None:
        await self._admin("/continue_generation", {})

    async def flush(self) -> None:
        """Forgets the KV cache. A server with requests in work refuses with HTTP 400: asked again for ten seconds."""
        for tries_left in reversed(range(_FLUSH_TRIES)):
            try:
                await self._admin("/flush_cache", {})
                return
            except RequestRefused as refusal:
                if refusal.status != 400 or not tries_left:
                    raise
            await asyncio.sleep(_FLUSH_PAUSE_S)

    async def release_memory(self, tags: Iterable[str]) -> None:
        """Frees device memory; the values in it are lost. A server that generates would die: pause it before."""
        await self._admin("/release_memory_occupation", {"tags": sorted(tags)})

    async def take_memory(self, tags: Iterable[str]) -> None:
        """Takes back what was released; a server would die of a tag that was not."""
        await self._admin("/resume_memory_occupation", {"tags": sorted(tags)})

    async def weight_version(self) -> str:
        """Of the weights that the server holds."""
        try:
            return str((await self._info("model_info"))["weight_version"])
        except (KeyError, TypeError) as error:
            raise RequestFailed(f"{self.url}/model_info names no weight_version: {error!r}") from error

    async def checksums(self) -> dict[str, str] | None:
        """Of every parameter of every rank, by `rank:name`. None of a server that cannot tell, as one on a CPU before 0.5.23."""
        try:
            ranks = (await self._admin("/weights_checker", {"action": "checksum"}))["ranks"]
            told = [(number, rank["checksums"].items()) for number, rank in enumerate(ranks)]
        except (RequestRefused, KeyError, TypeError, AttributeError):
            return None
        return {f"{number}:{name}": value for number, items in told for name, value in items}

    async def load_from_disk(self, folder: str, weight_version: str) -> None:
        """Loads a folder of safetensors and flushes. The format is named: a server started with dummy weights would
        otherwise draw random ones again."""
        body = {"model_path": folder, "load_format": "safetensors", "weight_version": weight_version}
        await self._admin("/update_weights_from_disk", {**body, "flush_cache": True})

    async def join_group(self, name: str, host: str, port: int, offset: int, world_size: int, backend: str) -> None:
        """The server's ranks join a process group as ranks `offset` and up; rank 0 sends."""
        body = {"master_address": host, "master_port": port, "rank_offset": offset, "world_size": world_size}
        await self._admin("/init_weights_update_group", {**body, "group_name": name, "backend": backend})

    async def leave_group(self, name: str) -> None:
        await self._admin("/destroy_weights_update_group", {"group_name": name})

    async def begin_update(self) -> None:
        """Opens a session, where the version has them: none of its partial weights is served before `end_update`."""
        if self._sessions:
            await self._admin("/begin_weight_update", {"selector": "all"})

    async def receive(self, tensors: Sequence[tuple[str, torch.Tensor]], group: str, final_version: str | None) -> None:
        """Receives the broadcast of `tensors`, in order; the last bucket brings the version and flushes."""
        body = {
            "names": [name for name, _ in tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "group_name": group,
            "flush_cache": final_version is not None,
            "weight_version": final_version,
        }
        await self._admin("/update_weights_from_distributed", body)

    async def open_tensors(self, handles: Sequence[str], final_version: str | None) -> None:
        """Copies weights from the memory that `handles`, one a rank, let it open (shared_bucket.py); the last bucket
        brings the version and flushes."""
        last = {"flush_cache": final_version is not None, "weight_version": final_version}
        body = {"serialized_named_tensors": list(handles), "load_format": "flattened_bucket", **last}
        await self._admin("/update_weights_from_tensor", body)

    async def end_update(self) -> None:
        if self._sessions:
            await self._admin("/end_weight_update", {})

    async def _info(self, name: str) -> Any:
        """`/server_info` or `/model_info`; older versions have them under /get_… only."""
        try:
            return await self._get(f"/{name}")
        except RequestRefused as refusal:
            if refusal.status != 404:
                raise
            return await self._get(f"/get_{name}")

    async def _get(self, path: str) -> Any:
        return await self._http.call("GET", self.url + path, None, self._keys.api, self._timeout_s)

    async def _admin(self, path: str, body: dict[str, Any]) -> Any:
        key = self._keys.admin or self._keys.api
        return await self._http.call("POST", self.url + path, body, key, self._timeout_s)
