"""Commands as trees."""

from __future__ import annotations

from dapo_mcore.foreign.bash.commands import parse
from dapo_mcore.foreign.bash.syntax import Assignment, Case, For, Function, Group, If, Simple, While


def only(text: str) -> object:
    ((_, _, command),) = parse(text, "run.sh")[0].steps
    return command


def test_assignments_stand_before_the_words() -> None:
    command = only("a=1 b+=2 train c=3")
    assert isinstance(command, Simple)
    assert [(item.name, item.append) for item in command.assignments] == [("a", False), ("b", True)]
    assert [word.plain for word in command.words] == ["train", "c=3"]


def test_arrays_hold_words_across_lines_and_comments() -> None:
    command = only("A=(\n a # x\n [k]=b\n)")
    ((key, first), (other, second)) = command.assignments[0].value
    assert (key, first.plain, first.line) == (None, "a", 2)
    assert (other.plain, second.plain, second.line) == ("k", "b", 3)


def test_lists_keep_their_joints() -> None:
    (listed,) = parse("a && ! b ||\n c | d", "run.sh")
    assert [(joint, negated) for joint, negated, _ in listed.steps] == [
        ("", False),
        ("&&", True),
        ("||", False),
        ("|", False),
    ]


def test_compound_commands() -> None:
    kinds = {
        "if a; then b; elif c; then d; else e; fi": If,
        "for x in 1 2; do a; done": For,
        "while a; do b; done": While,
        "case x in a|b) c;; *) d; esac": Case,
        "f() { a; }": Function,
        "function f { a; }": Function,
        "{ a; }": Group,
        "(a; b)": Group,
    }
    assert {text: type(only(text)) for text in kinds} == kinds
    assert len(only("if a; then b; elif c; then d; else e; fi").arms) == 3


def test_declarations_hold_assignments() -> None:
    command = only("export a=1 b")
    assert isinstance(command.words[1], Assignment)


def test_here_documents_and_redirections_are_no_words() -> None:
    first, second = parse("train a > log 2>&1 <<EOF\nb c\nEOF\nnext", "run.sh")
    assert [word.plain for word in first.steps[0][2].words] == ["train", "a"]
    assert second.steps[0][2].line == 4
