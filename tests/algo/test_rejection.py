"""Rejection by hand, and against verl's formula in fp64."""

import math

import pytest
import torch

from dapo_mcore.algo.rejection import rejected, sample_sums
from dapo_mcore.config.algo import RejectionConfig
from dapo_mcore.config.file import parse_config
from dapo_mcore.errors import ConfigError

IDS = torch.tensor([0, 0, 2, 2, 2])
COUNTS = torch.tensor([2, 0, 3])
LOGS = torch.tensor([2.0, 0.125, 1.0, 1.5, 1.0], dtype=torch.float64).log()


def judge(logs=LOGS, **criterion):
    rule = RejectionConfig(**criterion)
    parts = [sample_sums(rule, logs[part], IDS[part], 3) for part in (slice(1), slice(1, 5))]  # as of two ranks
    return rejected(rule, logs, IDS, sum(parts), COUNTS).int().tolist()


def test_by_hand():
    assert judge(level="token", lower=0.5, upper=2.0) == [0, 1, 0, 0, 0]  # bounds are kept
    assert judge(level="sequence", lower=0.25) == [0, 0, 0, 0, 0]
    assert judge(level="sequence", lower=0.26) == [1, 1, 0, 0, 0]
    assert judge(level="sequence", upper=1.4) == [0, 0, 1, 1, 1]
    assert judge(level="geometric", lower=0.49) == [0, 0, 0, 0, 0]
    assert judge(level="geometric", lower=0.51, upper=1.1) == [1, 1, 1, 1, 1]
    assert judge(level="every", lower=0.2) == [1, 1, 0, 0, 0]
    assert judge(level="token", measure="k2", upper=math.log(2) ** 2 / 2) == [0, 1, 0, 0, 0]
    assert judge(level="token", measure="k3", upper=0.31) == [0, 1, 0, 0, 0]  # 2 - 1 - log 2 = 0.307


def test_not_a_number_is_not_rejected():
    logs = LOGS.clone()
    logs[2] = torch.nan
    assert judge(logs, level="sequence", upper=1.0)[2:] == [0, 0, 0]


@pytest.mark.parametrize("option", ["token", "seq_sum", "seq_mean", "seq_max"])
@pytest.mark.parametrize("measure", ["k1", "k2", "k3"])
def test_every_option_of_verl_has_its_level_and_measure(option, measure):
    """verl's k1 is -log r, so its bounds are those of 1/r."""
    if (option, measure) == ("seq_max", "k1"):
        return
    noise = torch.Generator().manual_seed(7)
    logs = 0.4 * torch.randn(40, 9, dtype=torch.float64, generator=noise)
    mask = torch.rand(40, 9, generator=noise) < 0.7
    low, high = (0.9, 1.1) if option == "seq_mean" else (0.6, 1.3)
    if measure != "k1":
        high = 0.08 if option == "seq_mean" else 0.3
    value = {"k1": -logs, "k2": logs**2 / 2, "k3": logs.exp() - 1 - logs}[measure]
    if option != "token":
        masked = value.masked_fill(~mask, -math.inf if option == "seq_max" else 0.0)
        found = {"seq_sum": masked.sum(1), "seq_mean": masked.sum(1) / mask.sum(1), "seq_max": masked.amax(1)}[option]
        value = found[:, None].expand(-1, 9)
    keep = (value <= high) if measure != "k1" else (value >= math.log(low)) & (value <= math.log(high))

    bounds = {"lower": 1 / high, "upper": 1 / low} if measure == "k1" else {"upper": high}
    levels = {"token": "token", "seq_sum": "sequence", "seq_mean": "geometric", "seq_max": "every"}
    rule = RejectionConfig(level=levels[option], measure="ratio" if measure == "k1" else measure, **bounds)
    ids = torch.arange(40)[:, None].expand(-1, 9)[mask]
    sums = sample_sums(rule, logs[mask], ids, 40)
    ours = ~rejected(rule, logs[mask], ids, sums, mask.sum(1))
    assert torch.equal(ours, keep[mask]) and 0 < ours.sum() < len(ours)


@pytest.mark.parametrize(
    ("criterion", "told"),
    [
        ("{level: token}", "level token has neither lower nor upper, so it rejects nothing; set at least one"),
        ("{level: token, lower: 2, upper: 1}", "lower 2.0 exceeds upper 1.0, so everything is rejected; exchange them"),
        ("{level: every, measure: k3, lower: 1}", "so only upper rejects disagreement: leave lower out"),
        ("{level: batch, upper: 1}", "set token, sequence, geometric or every"),
    ],
)
def test_a_criterion_that_makes_no_sense_is_refused(criterion, told):
    import yaml

    tree = {"model": {"path": "m"}, "data": {"files": ["f"]}, "algo": {"rejection": [yaml.safe_load(criterion)]}}
    with pytest.raises(ConfigError, match=told):
        parse_config(tree)
