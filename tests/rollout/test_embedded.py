from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from dapo_mcore.data.stops import StopTexts
from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.embedded import EmbeddedEngine, draw_tokens
from dapo_mcore.types import SamplingParams
from tests.rollout.spelling import first_end, speller

VOCAB, STOPS = 16, (1, 2)
PROBS = torch.tensor([0.5, 0.05, 0.25, 0.2], dtype=torch.float64)
N = 40_000


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: tiny matrices gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(tied: bool = False) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        tie_word_embeddings=tied,
    )


def reference_model(tied: bool = False) -> torch.nn.Module:
    """Return a model with weights so large that its distribution is far from uniform and depends on position and context."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(tiny_config(tied), attn_implementation="eager", dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model.eval().requires_grad_(False)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())  # without the tied alias


def empty_engine(
    tied: bool = False, stops: tuple[int, ...] = STOPS, max_batch: int = 64, texts: StopTexts | None = None
) -> EmbeddedEngine:
    return EmbeddedEngine(
        tiny_config(tied), stop_token_ids=stops, stop_texts=texts, pad_token_id=0, max_batch=max_batch, num_threads=1
    )


def loaded_engine(**options) -> EmbeddedEngine:
    engine = empty_engine(**options)
    engine.update_weights(iter(weights_of(reference_model(options.get("tied", False))).items()), version=3)
    return engine


def params(max_new_tokens: int = 12, temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1, seed: int = 0):
    return SamplingParams(temperature, top_p, top_k, max_new_tokens, seed)


def prompts_of(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]  # may hold pad and stop tokens


@cache
def fp64_model() -> torch.nn.Module:
    return reference_model().double()


def teacher_forced(prompt: np.ndarray, response: np.ndarray, temperature: float) -> np.ndarray:
    """Return the log-probs of one response in fp64, alone in its batch, without a cache."""
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
    logits = fp64_model()(ids).logits[0, len(prompt) - 1 : -1]
    laws = (logits / temperature).log_softmax(-1)
    return laws.gather(-1, ids[0, len(prompt) :, None])[:, 0].numpy()


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(a.token_ids, b.token_ids)
        and np.array_equal(a.logprobs, b.logprobs)
        and a.finish_reason == b.finish_reason
        for a, b in zip(left, right)
    )


@pytest.mark.parametrize("lengths", [(6, 6, 6, 6), (1, 9, 4, 4, 2, 9, 7)], ids=["uniform", "ragged"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_batch", [3, 64])
def test_logprobs_are_those_of_a_teacher_forced_pass(lengths, temperature, max_batch):
    prompts = [prompt for prompt in prompts_of(*lengths) for _ in range(3)]
    rollouts = loaded_engine(max_batch=max_batch).generate(prompts, params(temperature=temperature))
    assert len({len(r.token_ids) for r in rollouts}) > 3, "rows must end at different times to exercise compaction"
    for prompt, rollout in zip(prompts, rollouts):
        expected = teacher_forced(prompt, rollout.token_ids, temperature)
        np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-5, rtol=0)


def test_record_types_and_version():
    rollout = loaded_engine().generate(prompts_of(4), params())[0]
    assert (rollout.token_ids.dtype, rollout.logprobs.dtype, rollout.loss_mask.dtype) == (
        np.int32,
        np.float32,
        np.bool_,
    )
    assert len(rollout.token_ids) == len(rollout.logprobs) == len(rollout.loss_mask)
    assert rollout.loss_mask.all() and rollout.weight_version == 3


def test_a_response_ends_with_its_first_stop_token_or_at_the_limit():
    rollouts = loaded_engine().generate(prompts_of(4) * 200, params(max_new_tokens=6))
    last_tokens = set()
    for rollout in rollouts:
        assert not np.isin(rollout.token_ids[:-1], STOPS).any()
        if rollout.finish_reason == "stop":
            last_tokens.add(int(rollout.token_ids[-1]))
        else:
            assert rollout.finish_reason == "length" and len(rollout.token_ids) == 6
            assert rollout.token_ids[-1] not in STOPS
    assert last_tokens == set(STOPS)
    assert any(r.finish_reason == "length" for r in rollouts)
    assert any(r.finish_reason == "stop" and len(r.token_ids) == 6 for r in rollouts), "a stop on the last token"


def test_each_response_may_have_a_limit_of_its_own():
    """The context has 40 positions: no limit for all prompts would let the short one have 30 tokens and take the long one."""
    prompts, limits = prompts_of(4, 30, 4, 4) * 20, [30, 8, 1, 5] * 20
    engine = loaded_engine()
    limited = engine.generate(prompts, params(max_new_tokens=30), limits)
    for row, (rollout, limit) in enumerate(zip(limited, limits)):
        length = len(rollout.token_ids)
        assert length == limit if rollout.finish_reason == "length" else 0 < length <= limit
        expected = teacher_forced(prompts[row], rollout.token_ids, 1.0)
        np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-5, rtol=0)
    assert {limit for limit, r in zip(limits, limited) if r.finish_reason == "length"} >= {8, 1, 5}
    short = [row for row, limit in enumerate(limits) if limit != 8]
    alone = engine.generate([prompts[row] for row in short], params(max_new_tokens=30), [limits[row] for row in short])
    free = engine.generate([prompts[row] for row in short], params(max_new_tokens=30))
    for ours, whole, row in zip(alone, free, short):
        assert ours.token_ids.tolist() == whole.token_ids[: limits[row]].tolist()
    with pytest.raises(RolloutError, match="prompt 1 has 30 tokens; with max_new_tokens 11 that is 41"):
        engine.generate(prompts, params(max_new_tokens=30), [30, 11, 1, 5] * 20)


def test_first_tokens_follow_the_models_distribution():
    prompt, n = prompts_of(5)[0], 20_000
    rollouts = loaded_engine(max_batch=n).generate([prompt] * n, params(max_new_tokens=1, temperature=1.3))
    counts = np.bincount([r.token_ids[0] for r in rollouts], minlength=VOCAB)
    logits = fp64_model()(torch.from_numpy(prompt).long()[None]).logits[0, -1]
    expected = (logits / 1.3).softmax(-1).numpy()
    assert (abs(counts / n - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()


def test_greedy_takes_the_most_likely_token_whatever_the_seed():
    prompts = prompts_of(3, 5)
    rollouts = loaded_engine().generate(prompts, params(temperature=0, seed=1))
    assert same(rollouts, loaded_engine().generate(prompts, params(temperature=0, seed=2)))
    model = reference_model()
    for prompt, rollout in zip(prompts, rollouts):
        ids = torch.from_numpy(np.concatenate([prompt, rollout.token_ids])).long()[None]
        assert model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == rollout.token_ids.tolist()


def test_top_k_one_is_greedy():
    greedy = loaded_engine().generate(prompts_of(3, 5), params(temperature=0))
    assert same(greedy, loaded_engine().generate(prompts_of(3, 5), params(top_k=1)))


def test_the_seed_and_nothing_else_decides():
    engine, prompts = loaded_engine(), prompts_of(4, 6, 6, 3) * 8
    first = engine.generate(prompts, params(seed=7))
    torch.manual_seed(99)
    torch.rand(5)
    assert same(first, engine.generate(prompts, params(seed=7)))
    assert not same(first, engine.generate(prompts, params(seed=8)))
    assert {rollout.seed for rollout in first} == {7}


def test_repeats_of_a_prompt_differ():
    rollouts = loaded_engine().generate(prompts_of(4) * 16, params())
    assert len({r.token_ids.tobytes() for r in rollouts}) > 8


def test_generation_leaves_the_global_rng_and_thread_count_alone():
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    engine = EmbeddedEngine(tiny_config(), stop_token_ids=STOPS, pad_token_id=0, max_batch=8, num_threads=threads + 1)
    engine.update_weights(iter(weights_of(reference_model()).items()), version=1)
    seen = []
    engine.on_progress = lambda n: seen.append(torch.get_num_threads())
    engine.generate(prompts_of(4), params())
    assert set(seen) == {threads + 1} and torch.get_num_threads() == threads
    assert torch.equal(state, torch.random.get_rng_state())


def test_progress_counts_every_sequence_once():
    engine, seen = loaded_engine(max_batch=5), []
    engine.on_progress = seen.append
    engine.generate(prompts_of(4, 6, 6, 3) * 4, params(max_new_tokens=5))
    assert sum(seen) == 16 and min(seen) > 0


def test_no_prompts_no_rollouts():
    assert loaded_engine().generate([], params()) == []


@pytest.mark.parametrize("tied", [False, True])
def test_takes_a_stream_with_or_without_the_tied_head(tied):
    model = reference_model(tied)
    streams = [weights_of(model), dict(model.state_dict())]
    assert len(streams[1]) == len(streams[0]) + tied
    outputs = []
    for stream in streams:
        engine = empty_engine(tied)
        engine.update_weights(iter(stream.items()), version=1)
        outputs.append(engine.generate(prompts_of(4, 6), params()))
    assert same(*outputs)


def test_weights_are_copied_not_borrowed():
    weights = {name: tensor.clone() for name, tensor in weights_of(reference_model()).items()}
    engine = empty_engine()
    engine.update_weights(iter(weights.items()), version=1)
    before = engine.generate(prompts_of(4), params())
    for tensor in weights.values():
        tensor.zero_()
    assert same(before, engine.generate(prompts_of(4), params()))


def _without(weights, name):
    return {k: v for k, v in weights.items() if k != name}


NORM = "model.layers.1.input_layernorm.weight"
BAD_STREAMS = {
    "missing": (lambda w: _without(w, NORM).items(), f"lacks 1 of .* tensors: {NORM}"),
    "unexpected": (
        lambda w: {**w, "model.extra.weight": torch.ones(1)}.items(),
        "model.extra.weight is not in the model",
    ),
    "shape": (lambda w: {**w, NORM: torch.ones(31)}.items(), rf"{NORM} has shape \[31\], but \[32\] in the model"),
    "twice": (lambda w: [*w.items(), (NORM, w[NORM])], f"{NORM} came twice"),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_after_a_bad_stream_nothing_is_generated_until_a_whole_one_came(case):
    engine, whole = loaded_engine(), weights_of(reference_model())
    before = engine.generate(prompts_of(4, 6), params())
    make, message = BAD_STREAMS[case]
    with pytest.raises(RolloutError, match=message):
        engine.update_weights(iter(make({name: tensor + 1 for name, tensor in whole.items()})), version=4)
    assert engine.weight_version == -1
    with pytest.raises(RolloutError, match="no complete weights"):
        engine.generate(prompts_of(4, 6), params())
    engine.update_weights(iter(whole.items()), version=3)
    assert same(before, engine.generate(prompts_of(4, 6), params()))


def test_a_stream_that_breaks_off_leaves_no_weights_to_generate_with():
    engine = loaded_engine()

    def stream():
        yield from list(weights_of(reference_model()).items())[:5]
        raise ConnectionError("peer died")

    with pytest.raises(ConnectionError):
        engine.update_weights(stream(), version=4)
    with pytest.raises(RolloutError, match="no complete weights"):
        engine.generate(prompts_of(4), params())


def test_an_update_allocates_no_second_model(monkeypatch):
    weights, models, build = weights_of(reference_model()), [], AutoModelForCausalLM.from_config
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_config", lambda *args, **kwargs: models.append(build(*args, **kwargs)) or models[0]
    )
    engine = loaded_engine()
    places = {name: tensor.data_ptr() for name, tensor in models[0].named_parameters()}
    with torch.profiler.profile(profile_memory=True) as profile:
        engine.update_weights(iter(weights.items()), version=4)
    largest = max(tensor.nbytes for tensor in weights.values())
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) <= largest
    assert {name: tensor.data_ptr() for name, tensor in models[0].named_parameters()} == places


def test_a_head_that_contradicts_the_tie_is_refused():
    stream = dict(reference_model(tied=True).state_dict())
    stream["lm_head.weight"] = stream["lm_head.weight"] + 1
    with pytest.raises(RolloutError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        empty_engine(tied=True).update_weights(iter(stream.items()), version=1)


def test_generate_before_weights_is_refused():
    engine = empty_engine()
    assert engine.weight_version == -1
    with pytest.raises(RolloutError, match="no complete weights"):
        engine.generate(prompts_of(4), params())


def test_a_prompt_without_room_for_its_response_is_refused_with_numbers():
    """The other limits: sampling/test_limits.py."""
    message = "prompt 1 has 29 tokens; with max_new_tokens 12 that is 41, .*max_position_embeddings 40"
    with pytest.raises(RolloutError, match=message):
        loaded_engine().generate(prompts_of(3, 29), params())


def test_the_longest_allowed_prompt_is_taken():
    rollout = loaded_engine(stops=()).generate(prompts_of(28), params())[0]
    assert len(rollout.token_ids) == 12


def frequencies(**law: float) -> torch.Tensor:
    uniforms = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tokens, _ = draw_tokens(PROBS.log().expand(N, -1), uniforms, params(**law))
    return torch.bincount(tokens, minlength=4).double() / N


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ({}, [0.5, 0.05, 0.25, 0.2]),
        # p^2 = .25, .0025, .0625, .04, sum .355
        ({"temperature": 0.5}, [0.25 / 0.355, 0.0025 / 0.355, 0.0625 / 0.355, 0.04 / 0.355]),
        ({"top_k": 2}, [2 / 3, 0, 1 / 3, 0]),
        # 0.5 + 0.25 reaches 0.7, so the third token is out
        ({"top_p": 0.7}, [2 / 3, 0, 1 / 3, 0]),
        ({"top_p": 0.76}, [0.5 / 0.95, 0, 0.25 / 0.95, 0.2 / 0.95]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        # top-p acts on what top-k leaves: 2/3 of the mass of the best two is the best one
        ({"top_k": 2, "top_p": 0.66}, [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_that_the_parameters_give(law, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    five_sigma = 5 * (expected * (1 - expected) / N).sqrt()
    assert ((frequencies(**law) - expected).abs() <= five_sigma).all()


def test_logprob_is_after_temperature_and_before_top_k():
    tokens, logprobs = draw_tokens(PROBS.log()[None], torch.tensor([0.99]), params(temperature=0.5, top_k=1))
    assert tokens.tolist() == [0]
    assert logprobs.item() == pytest.approx(math.log(0.25 / 0.355), abs=1e-6)


def test_temperature_zero_is_greedy_with_the_logprob_of_temperature_one():
    tokens, logprobs = draw_tokens(PROBS.log()[None], torch.tensor([0.99]), params(temperature=0))
    assert tokens.tolist() == [0]
    assert logprobs.item() == pytest.approx(math.log(0.5), abs=1e-6)


def test_extreme_uniforms_never_pick_an_impossible_token():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).expand(2, -1)
    tokens, _ = draw_tokens(logits, torch.tensor([0.0, 1.0], dtype=torch.float64), params())
    assert tokens.tolist() == [1, 2]


def test_logits_that_are_not_finite_give_a_token_with_a_log_prob_that_says_so():
    logits = torch.stack([torch.full((5,), math.nan), torch.zeros(5)])
    for temperature in (0.0, 1.0):
        tokens, logprobs = draw_tokens(
            logits, torch.tensor([0.5, 0.5], dtype=torch.float64), params(temperature=temperature)
        )
        assert 0 <= int(tokens[0]) < 5 and logprobs.isnan().tolist() == [True, False]


@pytest.mark.parametrize("lengths", [(6,) * 40, (1, 9, 4, 4, 2, 9, 7) * 6], ids=["uniform", "ragged"])
def test_a_stop_text_ends_a_response_at_the_token_that_completes_it(lengths):
    """A row's draws do not depend on when others end, so each response is the beginning of the one without stop texts."""
    tokenizer, texts = speller(VOCAB - 2, ("'", "("), ("+", "&")), ("(+", "*'", "%%")
    prompts = prompts_of(*lengths)
    whole = loaded_engine(stops=(1,)).generate(prompts, params(30, temperature=2.0))
    ended = loaded_engine(stops=(1,), texts=StopTexts(texts, tokenizer)).generate(prompts, params(30, temperature=2.0))
    assert 10 < sum(first_end(tokenizer, rollout, texts) is not None for rollout in whole) < len(whole)
    for rollout, cut in zip(whole, ended, strict=True):
        length = first_end(tokenizer, rollout, texts)
        assert cut.token_ids.tolist() == rollout.token_ids[:length].tolist()
        np.testing.assert_allclose(cut.logprobs, rollout.logprobs[:length], atol=1e-5)
        assert cut.finish_reason == ("stop" if length else rollout.finish_reason) and len(cut.loss_mask) == len(
            cut.token_ids
        )


def test_a_stop_text_at_the_last_token_allowed_is_no_truncation():
    tokenizer = speller(VOCAB)
    (whole,) = loaded_engine(stops=()).generate(prompts_of(5), params(6))
    text = tokenizer.decode(whole.token_ids[-1:].tolist())
    at_end = first_end(tokenizer, whole, (text,))
    engine = loaded_engine(stops=(), texts=StopTexts([text], tokenizer))
    (ended,) = engine.generate(prompts_of(5), params(at_end))
    assert whole.truncated and not ended.truncated and len(ended.token_ids) == at_end
