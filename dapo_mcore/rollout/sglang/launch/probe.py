"""What a running server must be before a run relies on it: reachable, ours to steer, new enough, with our model.

Change here: a condition on servers that is checked at start, with the sentence that a user reads when it fails.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang.client.api import ServerApi, ServerFacts
from dapo_mcore.rollout.sglang.client.http import RequestFailed, RequestRefused
from dapo_mcore.rollout.sglang.client.versions import check_version


async def probe(api: ServerApi, hf_config: PretrainedConfig, resumes: bool = False) -> ServerFacts:
    """What the server says of itself. Raises ConfigError with the remedy when a run cannot use it.

    resumes  requests in flight go on after a weight update, under the new weights.
    """
    try:
        facts = await api.facts()
        check_version(facts.version, api.url, resumes)
        await api.flush()
        vocab_size = await api.vocab_size()
    except RequestFailed as error:
        raise ConfigError(f"no SGLang server answers: {error}; start it, or correct rollout.sglang.urls") from error
    except RequestRefused as refusal:
        if refusal.status not in (401, 403):
            raise ConfigError(
                f"{api.url} does not answer like an SGLang server: HTTP {refusal.status} from {refusal.url}; correct "
                "rollout.sglang.urls"
            ) from refusal
        raise ConfigError(
            f"{refusal}; give the server's api_key and admin_key in rollout.sglang.key_file (SGLang's admin calls take the "
            "admin key alone, where there is one)"
        ) from refusal
    _check_model(api.url, facts, vocab_size, hf_config)
    return facts


async def probe_router(api: ServerApi, urls: Sequence[str]) -> None:
    """Nothing; raises ConfigError unless a router answers that sends requests to the servers `urls` and no others.

    A server that only the router knows never gets weights, so whatever it generates would be dropped, for ever.
    """
    try:
        workers = await api.workers()
    except RequestFailed as error:
        raise ConfigError(f"no router answers: {error}; start it, or correct rollout.sglang.router_url") from error
    if workers is None:
        return
    listed = {url.rstrip("/") for url in urls}
    unlisted, unknown = sorted(set(workers) - listed), sorted(listed - set(workers))
    if unlisted or unknown:
        raise ConfigError(
            f"the router {api.url} sends requests to {len(unlisted)} servers that rollout.sglang.urls does not list "
            f"({', '.join(unlisted) or 'none'}), and not to {len(unknown)} that it does ({', '.join(unknown) or 'none'}); "
            "list the same servers on both, by the same URLs"
        )


def _check_model(url: str, facts: ServerFacts, vocab_size: int | None, hf_config: PretrainedConfig) -> None:
    """A tensor of another shape would kill the server at the first update. Only what the server lets us see is compared:
    the vocabulary, and the rest where its model folder is visible here."""
    served = {"vocab_size": vocab_size} | _stored(Path(facts.model_path))
    for key, value in served.items():
        ours = getattr(hf_config, key, None)
        if None not in (value, ours) and value != ours:
            raise ConfigError(
                f"{url} serves a model with {key} {value} ({facts.model_path}), but model.path has {ours}; start the "
                "server with the model that is trained"
            )


def _stored(folder: Path) -> dict[str, int]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    return {key: config[key] for key in keys if key in config}
