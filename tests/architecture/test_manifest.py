"""The check of a weight stream against a model's tensors, and its split into buckets."""

from __future__ import annotations

import pytest
import torch

from dapo_mcore.architecture.manifest import WeightManifest, buckets
from dapo_mcore.errors import RolloutError
from tests.rollout.sglang.serving import tiny_config, tiny_model


def test_a_manifest_from_a_config_is_that_of_the_model():
    assert WeightManifest.of_config(tiny_config()) == WeightManifest.of_model(tiny_model(0))


def test_a_tied_head_may_be_absent_and_is_named():
    tied = WeightManifest.of_config(tiny_config(tie_word_embeddings=True))
    assert tied.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    names = [name for name in tied.shapes if name != "lm_head.weight"]
    stream = [(name, torch.zeros(tied.shapes[name])) for name in names]
    assert [name for name, _ in tied.checked(iter(stream), 1)] == names


SHAPES = WeightManifest({"a": torch.Size([2]), "b": torch.Size([3])}, {})


@pytest.mark.parametrize(
    ("stream", "passed", "message"),
    [
        ([("a", 2), ("b", 3), ("c", 1)], ["a", "b"], "1 tensors .*: c is not in the model"),
        ([("a", 2), ("a", 2), ("b", 3)], ["a"], "a came twice"),
        ([("a", 5), ("b", 3)], [], r"a has shape \[5\], but \[2\] in the model"),
        ([("b", 3)], ["b"], "weight version 7 lacks 1 of 2 tensors: a"),
    ],
)
def test_a_stream_that_does_not_fit_is_named_and_drained(stream, passed, message):
    left = iter([(name, torch.zeros(size)) for name, size in stream])
    seen = []
    with pytest.raises(RolloutError, match=message):
        seen.extend(name for name, _ in SHAPES.checked(left, 7))
    assert seen == passed and list(left) == []


def split(sizes: list[int], limit: int) -> list[tuple[list[int], bool]]:
    stream = ((str(size), torch.zeros(size, dtype=torch.uint8)) for size in sizes)
    return [([tensor.numel() for _, tensor in bucket], last) for bucket, last in buckets(stream, limit)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([4, 4, 4], [([4, 4], False), ([4], True)]),
        ([8, 1], [([8], False), ([1], True)]),
        ([20, 3, 3, 3], [([20], False), ([3, 3], False), ([3], True)]),
        ([5], [([5], True)]),
        ([], [([], True)]),
    ],
)
def test_buckets_stay_below_the_limit_and_the_last_is_known(sizes, expected):
    assert split(sizes, limit=8) == expected


def test_buckets_hold_the_tensors_themselves():
    tensor = torch.zeros(1)
    ((bucket, _),) = buckets(iter([("a", tensor)]), limit=100)
    assert bucket[0][1].data_ptr() == tensor.data_ptr()


def test_an_error_of_the_stream_comes_before_the_last_bucket():
    def stream():
        yield "a", torch.zeros(8)
        yield "b", torch.zeros(8)
        raise RolloutError("late")

    given = []
    with pytest.raises(RolloutError, match="late"):
        given.extend(buckets(stream(), limit=32))
    assert all(not last for _, last in given)
