"""Worker of test_digest.py: digests of an actor in real gloo processes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from dapo_mcore.replay.digest import Digester
from tests.actor.parity import Mesh, build_actor, make_batch, make_config, scored_step


def digests_of_a_step(layout: Any, mesh: Mesh, options: dict[str, Any]) -> dict[str, Any]:
    """Return all digests of one gradient step, as plain values."""
    config = make_config(mesh, **options, algo__old_logprobs="actor", batch__mini_batch_prompts=2)
    actor, batch = build_actor(config, layout), make_batch()
    offsets, digester = torch.from_numpy(batch.offsets), Digester(actor)
    found = {"start": digester.weights()}
    scored = scored_step(config, layout, batch, actor)
    found["inputs"] = digester.inputs([micro for mini in scored.mini_batches for micro in mini], offsets)
    mini = scored.mini_batches[0]
    actor.update(mini, check=lambda stats: found.update(step=digester.gradients(mini, stats.logprobs, offsets)))
    found["end"] = digester.weights()
    return {kind: {name: asdict(digest) for name, digest in part.items()} for kind, part in found.items()} | {
        "tokens": int(np.sum(batch.loss_mask))
    }
