from __future__ import annotations

from dapo_mcore.plan.change import changed, overrides
from tests.plan.jobs import job


def test_settings_are_replaced_and_the_rest_stays() -> None:
    paper = job()
    other = changed(
        paper, {"parallel.tensor_parallel": 4, "rollout.sglang.tensor_parallel": 2, "model.recompute": ["mlp"]}
    )
    assert other is not None
    assert (other.tensor, other.data, other.config.model.recompute) == (4, 16, ["mlp"])
    assert other.config.rollout.sglang.tensor_parallel == 2 and other.config.rollout.sglang.num_servers == 32
    assert other.config.data == paper.config.data
    assert paper.tensor == 8 and paper.config.model.recompute == "full"


def test_the_gpus_stay_where_the_configuration_chose_their_number() -> None:
    paper = job(nodes=0, rollout__sglang__num_servers=4)
    other = changed(paper, {"parallel.tensor_parallel": 4})
    assert other is not None and (paper.num_train, other.num_train, other.data) == (16, 16, 2)


def test_the_vocabulary_is_padded_anew() -> None:
    paper = job("Qwen2.5-1.5B", nodes=1, rollout__sglang__num_servers=2, parallel={})
    for tensor in (2, 1):
        other = changed(paper, {"parallel.tensor_parallel": tensor})
        assert other is not None and other.shape.padded_vocab_size % (8 * tensor) == 0


def test_what_a_rule_refuses_is_no_job() -> None:
    paper = job()
    assert changed(paper, {"parallel.tensor_parallel": 3}) is None  # the mesh
    assert changed(paper, {"model.recompute": ["moe"]}) is None  # the model has no experts
    assert changed(paper, {"batch.max_tokens": 100}) is None  # between sections
    assert changed(paper, {"model.recompute": "a bit"}) is None  # one value
    assert changed(paper, {"parallel.pipeline_parallel": 16, "parallel.tensor_parallel": 16}) is None  # the GPUs


def test_overrides_can_be_pasted_into_a_shell() -> None:
    told = overrides(
        {"model.recompute": ["mlp", "moe"], "a.b": None, "c": True, "model.fp8": {"recipe": "auto"}, "d": "full"}
    )
    assert told == ["'model.recompute=[mlp, moe]'", "a.b=null", "c=true", "'model.fp8={recipe: auto}'", "d=full"]
