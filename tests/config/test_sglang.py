"""Rules inside the section of the SGLang servers."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from dapo_mcore.config.file import load_config
from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import ConfigError


def test_a_rule_inside_a_section_ends_with_its_remedy_and_not_with_the_section(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"leave num_servers out, or urls to start servers$"):
        load_config(file, ["rollout.sglang={urls: ['http://a:1'], num_servers: 3}"])


def test_options_of_sglang_are_named_as_in_its_help() -> None:
    given = {"--mem_fraction_static": 0.8, "disable-radix-cache": True}
    assert SGLangConfig(server_args=given).server_args == {"mem-fraction-static": 0.8, "disable-radix-cache": True}


BAD_SETTINGS = {
    "every interface": dict(host="0.0.0.0"),
    "is not a URL": dict(urls=["127.0.0.1:30000"]),
    "only 1 different": dict(urls=["http://a:1", "http://a:1"]),
    "router_url needs urls": dict(router_url="http://a:1"),
    "verify_sync servers does not go with router_url": dict(
        urls=["http://a:1"], router_url="http://b:1", verify_sync="servers"
    ),
    "num_servers is 3, but urls names 2 servers": dict(urls=["http://a:1", "http://a:2"], num_servers=3),
    "num_servers is 1, but urls names 2 servers": dict(urls=["http://a:1", "http://a:2"], num_servers=1),
    "gloo cannot send FP8": dict(quantize="fp8", sync="distributed", device="cpu"),
    "server_args holds api-key, tp-size": dict(server_args={"api_key": "x", "--tp-size": 2}),
    "server_args names one option twice: max_x, max-x": dict(server_args={"max_x": 1, "max-x": 2}),
    "colocated needs servers that the run starts.*names 2": dict(colocated=True, urls=["http://a:1", "http://b:1"]),
    "sync distributed does not go with colocated": dict(colocated=True, sync="distributed"),
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_settings_that_contradict_themselves_are_refused(message):
    with pytest.raises(ValidationError, match=message):
        SGLangConfig.model_validate(BAD_SETTINGS[message])


def test_servers_that_are_given_are_counted():
    urls = ["http://a:1", "http://a:2"]
    given = SGLangConfig(urls=urls)
    assert given.num_servers == 2 and SGLangConfig().num_servers == 1
    assert given == SGLangConfig(urls=urls, num_servers=2) == SGLangConfig.model_validate(given.model_dump())
