from __future__ import annotations

import json

from dapo_mcore.plan.hardware import Assumptions, Gpu
from dapo_mcore.plan.plan import make_plan
from dapo_mcore.plan.remedies import problems
from dapo_mcore.plan.report import as_json, layout, report
from dapo_mcore.plan.suggest import suggest
from tests.plan.jobs import job


def test_the_screen_has_80_or_100_columns_and_every_section() -> None:
    for own, width in ((job(), 80), (job(rollout={"engine": "embedded"}), 100)):
        plan = make_plan(own)
        lines = report(plan, "h100", problems(plan), suggest(plan, 2), ["kept_ratio"], all_figures=False, width=width)
        assert [line for line in lines if len(line) > width] == []
        text = "\n".join(lines)
        for words in (
            "One rollout step",
            "Memory of a GPU",
            "GiB on the fullest GPU",
            "Time of a rollout step",
            "Suggestions",
        ):
            assert words in text
        assert ("Everything fits into memory." in text) == plan.fits and ("What does not fit" in text) != plan.fits
        assert "yours: kept_ratio 0.333333" in text and "guessed: mean_response_tokens 7168" in text


def test_the_batch_is_told_in_words() -> None:
    plan = make_plan(job())
    text = "\n".join(report(plan, "h100", [], None, [], all_figures=False))
    assert "run on 16 × 8 H100: all train, servers share them" in text
    assert "1,536 prompts × 16 = 24,576 responses" in text
    assert "16 gradient steps of 32 groups = 512 samples, 64 on each of 8 replicas" in text


def test_evaluations_are_told_beside_the_steps() -> None:
    plan = make_plan(job(eval={"sets": {"aime": {"files": ["unused"], "max_response_tokens": 32768, "limit": 30}}}))
    (own,) = plan.evaluations
    text = "\n".join(report(plan, "h100", [], None, [], all_figures=False))
    assert f"evaluation of aime: 240 responses of at most 32,768 tokens in {own.seconds:,.0f} s" in text
    (told,) = as_json(plan, [], None, [])["evaluations"]
    assert told == {"name": "aime", "responses": 240, "limit": 32768, "seconds": own.seconds}


def test_all_figures_are_explained() -> None:
    lines = report(make_plan(job()), "h100", [], None, [], all_figures=True, width=200)
    told = lines[lines.index(next(line for line in lines if line.startswith("Figures"))) + 1 :]
    assert len(told) == len(Gpu.__dataclass_fields__) + len(Assumptions.__dataclass_fields__)
    assert any(line.split()[:3] == ["gemm_efficiency", "0.75", "of"] and "measured" in line for line in told)


def test_layouts_in_short() -> None:
    assert layout(make_plan(job())) == "TP8·PP2·CP1·DP8 with sequence parallelism"
    assert layout(make_plan(job(parallel__virtual_pipeline_parallel=4))).startswith("TP8·PP2·VPP4·CP1·DP8")
    moe = job(
        "Qwen3-30B-A3B",
        nodes=1,
        parallel={"expert_parallel": 8},
        rollout__sglang__num_servers=1,
        rollout__sglang__tensor_parallel=8,
    )
    assert layout(make_plan(moe)) == "TP1·PP1·CP1·DP8·EP8·ETP1"


def test_the_json_has_the_same_figures() -> None:
    plan = make_plan(job(rollout={"engine": "embedded"}))
    found = json.loads(json.dumps(as_json(plan, problems(plan), suggest(plan, 1), ["kept_ratio"])))
    assert found["fits"] is False and found["gpus"] == {"train": 128, "servers": 0, "nodes": 16}
    assert found["parameters"] == 32_763_876_352
    assert found["memory"][0]["parts"] == plan.memory.train[0].parts
    assert found["time"]["step"] == plan.time.total and found["time"]["train"]["num_updates"] == 16
    assert found["problems"][0]["culprit"] == "embedded engine" and found["problems"][0]["remedies"]
    assert len(found["suggestions"]) == 1
    assert {"name": "kept_ratio", "source": "yours"}.items() <= next(
        f for f in found["figures"] if f["name"] == "kept_ratio"
    ).items()
