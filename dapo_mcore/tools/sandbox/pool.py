"""Many calls to the sandbox at once: a queue in front of workers, which start when they are first needed.

Change here: how calls share workers. worker.py is one of them.
"""

from __future__ import annotations

import asyncio

from dapo_mcore.errors import ToolError
from dapo_mcore.tools.sandbox.mechanisms import MECHANISMS
from dapo_mcore.tools.sandbox.worker import Ending, Settings, Worker, WorkerLost

_REMEDY = (
    "install bubblewrap (apt-get install bubblewrap) and allow user namespaces (sysctl user.max_user_namespaces, and 0 for "
    "kernel.apparmor_restrict_unprivileged_userns; in Docker --cap-add SYS_ADMIN --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined)"
)


class SandboxPool:
    """At most `num_workers` calls run at a time, in the order in which they came; all others wait.

    A worker that is lost takes its call with it. The call then runs once more in a new worker: it can have changed nothing.
    """

    def __init__(self, mechanism: str, num_workers: int, settings: Settings):
        self._mechanism = mechanism
        self._settings = settings
        self._slots = asyncio.Semaphore(num_workers)
        self._idle: list[Worker] = []
        self._workers: set[Worker] = set()

    async def start(self) -> None:
        """Start the first worker. Raise ToolError if none can be walled in here, or if an attack on its walls succeeds."""
        candidates = list(MECHANISMS) if self._mechanism == "auto" else [self._mechanism]
        reasons = []
        for self._mechanism in candidates:
            try:
                self._idle.append(await self._start_worker())
            except (WorkerLost, OSError) as error:
                reasons.append(f"{self._mechanism}: {error}")
            else:
                return
        raise ToolError(f"no sandbox works here, so no model-written code runs ({'; '.join(reasons)}); {_REMEDY}")

    async def run(self, code: str, timeout_s: float, output_bytes: int) -> Ending:
        """Run the code in a cell of its own, once a worker is free. The timeout starts then.

        Raise WorkerLost if two workers in a row are lost, ToolError if the walls of a new one do not hold.
        """
        async with self._slots:
            try:
                return await self._run_in_worker(code, timeout_s, output_bytes)
            except WorkerLost:
                return await self._run_in_worker(code, timeout_s, output_bytes)

    async def close(self) -> None:
        """Kill all workers."""
        await asyncio.gather(*(worker.close() for worker in self._workers))
        self._workers.clear()
        self._idle.clear()

    async def _run_in_worker(self, code: str, timeout_s: float, output_bytes: int) -> Ending:
        worker = self._idle.pop() if self._idle else await self._start_worker()
        try:
            return await worker.run(code, timeout_s, output_bytes)
        finally:
            if worker.usable:
                self._idle.append(worker)
            elif worker in self._workers:
                self._workers.remove(worker)
                await worker.close()

    async def _start_worker(self) -> Worker:
        worker = await Worker.start(self._mechanism, self._settings)
        self._workers.add(worker)
        return worker
