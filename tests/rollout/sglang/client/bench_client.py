"""The cost of answers that all arrive at once for the client: CPU, memory, and the longest turn of its event loop.

    pytest -m bench tests/rollout/sglang/client/bench_client.py

Two fake servers send one ready answer to every request. The wall time is mostly theirs: they share the machine's cores.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from tests.model_files.peak_memory import PeakMemory
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import engine, order, params, servers, tiny_config

pytestmark = pytest.mark.bench

VOCAB, CONTEXT, IN_FLIGHT = 151_936, 32_768, 2048
TICK_S = 0.005


@pytest.mark.parametrize("length", [128, 20_000])
def test_thousands_of_answers_at_once(length: int, tmp_path, capsys) -> None:
    config = tiny_config(vocab_size=VOCAB, hidden_size=8, max_position_embeddings=CONTEXT)
    python = fake_python(tmp_path, tokens_per_s=10_000, keep_alive_s=120)
    options = {"num_servers": 2, "health_interval_s": 60.0, "read_timeout_s": 600.0, "request_timeout_s": 600.0}
    with engine(tmp_path, python=python, config=config, max_in_flight=IN_FLIGHT, **options) as made:
        made.update_weights(iter(list(AutoModelForCausalLM.from_config(config).named_parameters())), version=1)
        for server in servers(made):
            order(server, "alike", count=IN_FLIGHT)
        asked = [np.arange(VOCAB - 100, VOCAB, dtype=np.int32)] * IN_FLIGHT
        with PeakMemory() as memory:
            ticks = made._loop.submit(measure_turns())
            wall, cpu = time.perf_counter(), time.process_time()
            rollouts = made.generate(asked, params(length))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            ticks.cancel()
        assert [len(rollout.token_ids) for rollout in rollouts] == [length] * IN_FLIGHT
        retries = made.metrics()["rollout/retries"]
    kept = sum(r.token_ids.nbytes + r.logprobs.nbytes + r.loss_mask.nbytes for r in rollouts)
    with capsys.disabled():
        print(
            f"\n{IN_FLIGHT} answers of {length} tokens: client CPU {1e3 * cpu / IN_FLIGHT:.2f} ms an answer, wall "
            f"{wall:.1f} s, longest turn of the loop {1e3 * max(TURNS_S):.0f} ms CPU, peak memory "
            f"{memory.peak_bytes / 2**20:.0f} MiB ({kept / 2**20:.0f} MiB of it samples), {retries:.0f} retries"
        )


TURNS_S: list[float] = []


async def measure_turns() -> None:
    """Measure each turn of the event loop in seconds of CPU of its thread, so that other processes do not count."""
    TURNS_S.clear()
    while True:
        start = time.thread_time()
        await asyncio.sleep(TICK_S)
        TURNS_S.append(time.thread_time() - start)
