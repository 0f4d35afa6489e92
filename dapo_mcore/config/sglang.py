"""The section `rollout.sglang`: which SGLang servers generate, how they are reached, and how weights reach them.

Change here: what a user may set about servers, and the rules inside the section. SGLang's own options stay upstream:
`server_args` passes them through.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dapo_mcore.config.values import Count, FilePath, Seconds, Section

EVERYWHERE = ("", "0.0.0.0", "::", "*")
_OWNED_MODEL_ARGS = {"model-path", "model", "tokenizer-path", "skip-tokenizer-init", "load-format", "dtype"}
_OWNED_PLACE_ARGS = {"device", "tp-size", "tensor-parallel-size", "tp", "base-gpu-id", "host", "port"}
_OWNED_OTHER_ARGS = {"api-key", "admin-api-key", "config", "enable-memory-saver", "weight-version", "help"}
OWNED_ARGS = _OWNED_MODEL_ARGS | _OWNED_PLACE_ARGS | _OWNED_OTHER_ARGS


class SGLangConfig(Section):
    """Servers are either started here (`num_servers`) or given (`urls`)."""

    urls: list[str] = Field(default_factory=list)
    """Servers that run already, as `http://host:port`. Empty: start num_servers."""
    router_url: str | None = None
    """SGLang's router in front of `urls`: generation goes through it, weights go to the servers themselves."""
    key_file: FilePath | None = None
    """JSON file of mode 0600 with the `api_key` and `admin_key` of the servers at `urls`. null: they need no keys. Servers
    started here get random keys, which are in servers/keys.json of the run's folder."""

    placement: Literal["local", "nodes", "ray"] = "local"
    """Where servers are started: on rank 0's machine (local), in turn on all nodes of the training job by the first rank of each
    (nodes; needs host node), or by Ray actors spread over a cluster (ray), whose nodes may be others."""
    num_servers: Count = 1
    """Number of servers to start. With `urls` it must equal the number of URLs."""
    python: FilePath | None = None
    """Interpreter of the environment that has SGLang; null: the trainer's own."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where servers compute."""
    tensor_parallel: Count = 1
    """GPUs of one server."""
    first_gpu: int | None = Field(None, ge=0, le=10_000)
    """placement local and nodes: servers get this GPU of a machine and the next ones. null: those after the trainer's processes
    on it, or the same ones when colocated."""
    colocated: bool = False
    """Servers and trainer share GPUs and take turns: servers give up their memory while the actor trains, and the actor
    waits in host memory while they generate. `server_args: {mem-fraction-static: …}` may then be high."""
    host: str = "127.0.0.1"
    """Address that servers started here listen on: loopback or the cluster's interface, never all of them; `node` is each
    node's own address."""
    base_port: int | None = Field(None, ge=1, le=65535)
    """Server i listens on base_port + i; null: free ports."""
    server_args: dict[str, Any] = Field(default_factory=dict)
    """More options of `sglang.launch_server`, without the dashes: {mem-fraction-static: 0.8}. true sets a flag, a list gives
    several values, null leaves an option of ours to SGLang."""
    start_timeout_s: Seconds = 900.0
    """For a server's start, from its process to its first answer about its health."""
    restart_budget: int = Field(3, ge=0, le=1_000_000)
    """Restarts of servers during a run, over all servers. A server that fails three times in a row at the same place is not
    started again whatever is left."""

    max_in_flight: Count = 1024
    """Requests that one server holds at a time."""
    max_attempts: Count = 6
    """Attempts per sample, including the first."""
    connect_timeout_s: Seconds = 10.0
    """For a connection to a server."""
    read_timeout_s: Seconds = 60.0
    """Limit from the first byte of an answer to its last."""
    request_timeout_s: Seconds = 3600.0
    """From sending a generation request to the end of its answer; with sampling.on_full keep, training lies in between. Also how
    long a request waits for the next sync, training included, when no server has the weights any more."""
    health_interval_s: Seconds = 10.0
    """Between two questions about a server's health."""
    health_timeout_s: Seconds = 30.0
    """For the answer to one."""

    sync: Literal["disk", "distributed", "tensor"] = "disk"
    """How weights reach the servers: safetensors in `sync_dir`, broadcasts from `senders` (NCCL, gloo on CPUs), or memory
    of their machine that servers open (tensor: CUDA IPC, /dev/shm on CPUs). With placement nodes, tensor sends each bucket once
    to the first rank of each node, which shares it there and needs the extra memory of `bucket_mib` too."""
    sync_dir: FilePath = "/dev/shm"
    """sync disk: a folder that every server sees under the same path."""
    sync_host: str = "127.0.0.1"
    """sync distributed: the address of rank 0's machine, as the servers reach it. Senders on other machines use theirs on the
    way to it."""
    servers_per_group: Count | None = None
    """sync distributed: servers that receive one broadcast together; null: all. Each group costs the trainer a pass of the
    weights. A server that dies in a broadcast breaks it for its group; if nobody else serves, the sync is repeated."""
    senders: Count = 4
    """sync distributed: at most as many ranks send the weights, each its own part: the first rank of each pipeline stage. They
    gather at the same time, and no NIC takes in the whole model. Each sender needs a process group of its own, which costs every
    server memory for NCCL. 1: rank 0 gathers and sends everything, as it also does with delta, and where another sender cannot
    reach a server."""
    delta: bool = False
    """sync tensor and distributed: only values that have changed since the last sync travel, which the servers check by sums of
    all bits. At RL's learning rates 1 to 3 % of bf16 values change: 2 to 7 % of the bytes travel. All servers get everything if
    one of them lacks the last weights. Saves time where sending is slow (a network of 100 Gbit/s, several groups of servers);
    gathering on rank 0 stays as it is. Costs a copy of the weights in rank 0's host memory (2 bytes per parameter in bf16, pinned
    beside a GPU), which crosses the bus in and out in each sync."""
    verify_sync: Literal["off", "servers"] = "off"
    """servers: after each sync the servers are asked for checksums of their weights, and those that differ from most of the
    others are taken out; a re-synced server must show what was agreed on. Needs GPUs, or SGLang 0.5.23."""
    quantize: Literal["none", "fp8"] = "none"
    """fp8: projections are sent and served in FP8 with a scale for each 128 × 128 tile (needs bf16 and a GPU with FP8; Llama and
    Mistral are refused, since SGLang drops their scales). Servers at `urls` must have been started from a config.json with
    SGLang's block FP8 `quantization_config`."""
    bucket_mib: int = Field(512, ge=1, le=1_000_000)
    """A sync needs at most twice this (from 128 up), or twice the largest tensor, of extra memory on rank 0, where a layer's
    matrices are small beside these."""
    sync_timeout_s: Seconds = 600.0
    """Limit of each step of a sync on each server."""

    @property
    def num_gpus(self) -> int:
        """GPUs of all servers together."""
        return self.num_servers * self.tensor_parallel

    @property
    def connections_per_server(self) -> int:
        """Connections that requests and other calls to one server may need at once."""
        return self.max_in_flight + 8

    @model_validator(mode="before")
    @classmethod
    def _count_urls(cls, values: Any) -> Any:
        """Set `num_servers` from `urls` if it is not set."""
        urls = values.get("urls") if isinstance(values, dict) else None
        return {"num_servers": len(urls), **values} if urls and isinstance(urls, list) else values

    @field_validator("server_args")
    @classmethod
    def _are_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Return the options under the names in SGLang's help, whether they were written with dashes or underscores."""
        options = {name.lstrip("-").replace("_", "-"): setting for name, setting in value.items()}
        if len(options) < len(value):
            raise ValueError(f"server_args names one option twice: {', '.join(value)}")
        owned = sorted(options.keys() & OWNED_ARGS)
        if owned:
            raise ValueError(
                f"server_args holds {', '.join(owned)}, which dapo_mcore sets; use the keys of rollout.sglang instead"
            )
        return options

    @field_validator("host", "sync_host")
    @classmethod
    def _names_one_interface(cls, value: str) -> str:
        if value in EVERYWHERE:
            raise ValueError(
                f"{value!r} stands for every interface, and SGLang's admin calls would be open to the network; "
                "use 127.0.0.1 or the address of the cluster's interface"
            )
        return value

    @field_validator("urls", "router_url")
    @classmethod
    def _are_urls(cls, value: list[str] | str | None) -> list[str] | str | None:
        for url in value if isinstance(value, list) else [value] if value else []:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not a URL; write http://host:port")
        return value

    @model_validator(mode="after")
    def _check(self) -> SGLangConfig:
        if self.urls and self.num_servers != len(self.urls):
            raise ValueError(
                f"num_servers is {self.num_servers}, but urls names {len(self.urls)} servers that run already, and none "
                "is started beside them; leave num_servers out, or urls to start servers"
            )
        if self.router_url and not self.urls:
            raise ValueError(
                "router_url needs urls: the router cannot update weights, so list the servers behind it as well"
            )
        if self.router_url and self.verify_sync != "off":
            raise ValueError(
                "verify_sync servers does not go with router_url: a server found to hold other weights is taken out, but the "
                "router would go on asking it"
            )
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"urls names {len(self.urls)} servers, but only {len(set(self.urls))} different ones")
        if self.quantize == "fp8" and self.sync == "distributed" and self.device == "cpu":
            raise ValueError(
                "quantize fp8 with sync distributed needs device cuda: gloo cannot send FP8; sync by disk or tensor"
            )
        if self.delta and (problem := self._against_delta()):
            raise ValueError(f"delta true does not go with {problem}")
        if self.colocated and self.urls:
            raise ValueError(
                f"colocated needs servers that the run starts, since it must end one that keeps its memory, but urls names "
                f"{len(self.urls)}; set num_servers instead"
            )
        if self.colocated and self.sync == "distributed" and self.device == "cuda":
            raise ValueError(
                "sync distributed does not go with colocated: NCCL refuses two processes on one GPU; sync by "
                + ("disk, with a sync_dir that all nodes share" if self.placement == "ray" else "tensor or disk")
            )
        return self

    def _against_delta(self) -> str | None:
        """Return the setting that changed values do not go with, why, and the remedy; None if there is none."""
        if self.sync == "disk":
            return (
                "sync disk: its folder holds whole weights, for servers that come back; set sync tensor or distributed"
            )
        if self.quantize != "none":
            return f"quantize {self.quantize}: one changed value changes the scale of its tile; set one of both off"
        if self.colocated:
            return "colocated: servers lose their weights when they give up memory, so each sync sends all; set delta false"
        if self.urls:
            return (
                f"urls: servers must start with the loader of changes, which only the run gives them, but urls names "
                f"{len(self.urls)} that run already; set num_servers instead"
            )
        if "custom-weight-loader" in self.server_args:
            return "server_args custom-weight-loader, which then names the loader of changes; leave one of both out"
        return None
