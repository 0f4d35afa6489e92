"""Stop texts on a real SGLang server: where they end a response, with the same tokens as on the embedded engine.

It needs the environment that tools/sglang_cpu/setup.sh makes.
"""

from __future__ import annotations

import numpy as np
import pytest

from dapo_mcore.data.stops import StopTexts
from dapo_mcore.rollout.embedded import EmbeddedEngine
from dapo_mcore.rollout.sglang import requests
from dapo_mcore.types import SamplingParams
from tests.rollout.sglang.asserts import mismatch
from tests.rollout.sglang.serving import STOP, VOCAB, engine, params, prompts, real_python, tiny_config, weights
from tests.rollout.spelling import first_end, speller

pytestmark = pytest.mark.sglang

TEXTS = ("*+", "BC", "+0", "AA", "9")
MERGES = (("*", "+"), ("C", "D"), ("9", "0"))


def test_texts_end_responses_on_the_server_where_the_embedded_engine_ends_them(tmp_path, monkeypatch):
    tokenizer = speller(VOCAB, *MERGES)
    texts = StopTexts(TEXTS, tokenizer)
    late = []

    def watched(rollout, given):
        cut = cut_at_text(rollout, given)
        late.append(len(rollout.token_ids) - len(cut.token_ids))
        return cut

    cut_at_text = requests.cut_at_text
    monkeypatch.setattr(requests, "cut_at_text", watched)
    asked = prompts(48)
    greedy = SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, max_new_tokens=40, seed=0)
    embedded = EmbeddedEngine(
        tiny_config(), stop_token_ids=(STOP,), stop_texts=texts, pad_token_id=0, max_batch=48, num_threads=1
    )
    embedded.update_weights(weights(0), version=0)
    with engine(tmp_path, python=real_python(), stop_texts=texts, num_servers=1) as made:
        made.update_weights(weights(0), 0)
        for ours, theirs in zip(made.generate(asked, greedy), embedded.generate(asked, greedy), strict=True):
            assert ours.token_ids.tolist() == theirs.token_ids.tolist() and ours.finish_reason == theirs.finish_reason
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
        drawn = made.generate(asked, params(40))
        assert mismatch(drawn, asked, 0) <= 1e-5
    ends = [first_end(tokenizer, rollout, TEXTS) for rollout in drawn]
    by_text = [rollout for rollout, end in zip(drawn, ends) if end is not None]
    assert len(by_text) > 5 and all(rollout.finish_reason == "stop" for rollout in by_text)
    assert all(end is None or end == len(rollout.token_ids) for rollout, end in zip(drawn, ends))
    assert sum(late) == 0, "the server ends them itself"
