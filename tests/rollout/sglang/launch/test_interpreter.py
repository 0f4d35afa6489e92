"""The interpreter of the servers, and `server_args` as a command line for it."""

from __future__ import annotations

import os
import sys

import pytest

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang.launch.interpreter import check_names, command_line, python_of, version_of

KINDS = {"a": "one", "many": "many", "flag": "flag", "pair": "pair"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"a": -1}, ["--a=-1"]),
        ({"a": "-x y"}, ["--a=-x y"]),
        ({"a": 1e-5}, ["--a=1e-05"]),
        ({"a": True}, ["--a=true"]),
        ({"a": [1, "b"]}, ['--a=[1, "b"]']),
        ({"a": {"k": None}}, ['--a={"k": null}']),
        ({"a": None}, []),
        ({"many": [1, 2.5, "x"]}, ["--many", "1", "2.5", "x"]),
        ({"many": []}, []),
        ({"many": 3}, ["--many=3"]),
        ({"flag": True, "pair": True}, ["--flag", "--pair"]),
        ({"flag": False, "pair": False}, ["--no-pair"]),
    ],
)
def test_each_kind_of_option_has_its_own_form_on_the_command_line(values, words):
    assert command_line(values, KINDS) == words


@pytest.mark.parametrize(
    ("given", "path"),
    [("python3", "python3"), ("venv/bin/python", "/run/venv/bin/python"), ("/venv/bin/python", "/venv/bin/python")],
)
def test_the_interpreters_path_is_absolute_since_servers_run_in_another_folder(given, path, monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: "/run")
    assert python_of(SGLangConfig(python=given)) == path
    assert python_of(SGLangConfig()) == sys.executable


def test_unknown_options_are_refused_with_the_nearest_names():
    check_names(["a", "pair"], KINDS, "here")
    told = "server_args holds flagg, zzz, but here has no such options; the nearest ones: flagg: flag; zzz: nothing like it"
    with pytest.raises(ConfigError, match=told):
        check_names(["a", "flagg", "zzz"], KINDS, "here")


def test_an_interpreter_is_asked_for_its_sglang(tmp_path):
    bare, broken = tmp_path / "bare", tmp_path / "broken"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    broken.write_text("#!/bin/sh\necho no such library >&2\n")
    for program in (bare, broken):
        program.chmod(0o755)
    assert version_of(str(bare)) is None
    with pytest.raises(ConfigError, match="cannot be asked for SGLang: no such library; give the interpreter"):
        version_of(str(broken))
