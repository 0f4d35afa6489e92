"""The interface on the way to another node."""

from __future__ import annotations

from dapo_mcore.process.route import interface_towards, main


def test_the_way_to_this_machine_is_its_loopback(capsys) -> None:
    assert main("127.0.0.1") == 0
    assert capsys.readouterr().out == "lo\n"


def test_an_address_that_no_interface_has_is_no_name_of_one(monkeypatch) -> None:
    monkeypatch.setattr("psutil.net_if_addrs", dict)
    assert interface_towards("127.0.0.1") == ""


def test_a_name_that_means_nothing_here_is_told_with_the_rule(capsys) -> None:
    assert main("n1.invalid") == 2
    said = capsys.readouterr().err
    assert " cannot reach n1.invalid, another node of the job: " in said and "NodeAddr" in said
