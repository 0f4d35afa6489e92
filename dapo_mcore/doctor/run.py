"""A configuration against a job: whether its run would start, and go on. Asked once, by rank 0.

Change here: what a run needs besides its nodes, see needs.py. Rules that a run checks itself are called (preflight.py), not repeated.
"""

from __future__ import annotations

import socket
import stat
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from dapo_mcore.config.schema import Config
from dapo_mcore.doctor.finding import Finding, State, hint, ok, outcome, wrong
from dapo_mcore.doctor.needs import Here

_CONNECT_S = 3.0


def check_config(config: Config, here: Here, addresses: Sequence[str] = ()) -> list[Finding]:
    """Return whether the run can start. Imports torch and transformers, reads rows but no weights.

    addresses  of the job's nodes, as they reach each other; none without a launcher
    """
    findings = [
        *check_start(config, here),
        *check_extensions(config, here),
        *check_private_files(config.run_dir),
        *check_tools(config),
    ]
    if config.rollout.engine == "sglang":
        findings += [check_url(url) for url in config.rollout.sglang.urls]
        findings += check_shared_folder(config, addresses)
    return findings


def check_start(config: Config, here: Here) -> list[Finding]:
    """Return whether a run of this configuration would start, or the first error of each part with which it would end."""
    from dapo_mcore.preflight import FILE_CHECKS, check_contents, check_run

    files = [outcome("start", "", partial(check, config)) for check in FILE_CHECKS]
    if missing := [found for found in files if found.state is State.WRONG]:
        return missing
    start = outcome("start", "files, model and parallel layout fit", lambda: check_run(config, here.processes))
    if start.state is State.WRONG:
        return [start]  # the rest reads these files
    contents = partial(check_contents, config, servers=here.has_sglang)
    return [start, outcome("data", "rows, weights, reward and servers' options fit", contents)]


def check_extensions(config: Config, here: Here) -> list[Finding]:
    """Return the keys that need Ray, or Transformer Engine on a GPU, if there is none."""
    engine = here.has_engine and here.num_gpus > 0
    servers = config.rollout.engine == "sglang" and config.rollout.sglang.placement == "ray"
    extra = "pip install 'dapo_mcore[te]' on a machine with a GPU, or "
    needs = [
        (
            config.model.transformer_impl == "transformer_engine",
            "model.transformer_impl transformer_engine",
            "set it auto",
        ),
        (
            config.optimizer.saves_memory,
            "optimizer state on the host or in bf16",
            "set offload_fraction 0, exp_avg_dtype fp32 and exp_avg_sq_dtype fp32",
        ),
        (config.model.fp8 is not None and here.num_gpus > 0, "model.fp8 on a GPU", "set model.fp8 null"),
    ]
    missing = [
        wrong("Transformer Engine", f"{what} needs it, but it is not in use", extra + remedy)
        for asked, what, remedy in needs
        if asked and not engine
    ]
    placements = {config.reward.placement, *(tool.placement for tool in config.tools)}
    if (servers or "ray" in placements) and not here.has_ray:
        missing.append(wrong("Ray", "placement ray needs it, but it is not installed", "pip install 'dapo_mcore[ray]'"))
    return missing


def check_tools(config: Config) -> list[Finding]:
    """Return whether the tools of this machine start: whether their functions load, and a sandbox holds."""
    from dapo_mcore.tools.toolset import ToolSet

    local = [tool.model_copy(update={"workers": 1}) for tool in config.tools if tool.placement == "local"]
    names = ", ".join(tool.name for tool in local)
    return [outcome("tools", f"{names}: started", lambda: ToolSet(local).close())] if local else []


def check_private_files(run_dir: Path) -> list[Finding]:
    """Return a hint for each file with servers' keys that others can read."""
    files = [path for pattern in ("keys.json", "server-*.yaml") for path in sorted(run_dir.glob(f"servers/{pattern}"))]
    open_to_others = [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077]
    return [
        hint(
            "key files",
            f"{path} has mode {stat.S_IMODE(path.stat().st_mode):04o}: others can read it",
            f"chmod 600 {path}",
        )
        for path in open_to_others
    ]


def check_shared_folder(config: Config, addresses: Sequence[str]) -> list[Finding]:
    """Return whether servers on other nodes see the folder of a sync by disk."""
    from dapo_mcore.rollout.sglang.sync.disk import check_sync_dir

    settings = config.rollout.sglang
    if settings.sync != "disk" or settings.placement != "nodes" or len(addresses) < 2:
        return []
    urls = [f"http://{f'[{address}]' if ':' in address else address}:1" for address in addresses]
    return [
        outcome(
            "shared sync_dir",
            f"servers of all nodes can see {settings.sync_dir}",
            lambda: check_sync_dir(Path(settings.sync_dir), urls),
        )
    ]


def check_url(url: str) -> Finding:
    """Return whether something listens at a server's address. Sends nothing, and uses no proxy."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:  # ValueError: no such port
        return wrong("servers", f"{url} cannot be reached: {error}", "start the server, or correct rollout.sglang.urls")
    return ok("servers", f"{url} listens")
