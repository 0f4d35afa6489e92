"""Following scripts: against bash itself on generated snippets, and by hand where only a run would tell."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.bash.follow import follow
from tests.foreign.bash.bash_reference import followed, shown, shown_by_bash

SNIPPETS = [
    "a=1; show $a ${a} \"$a\" '$a' \\$a",
    'a="x  y"; show $a "$a" p$a"q r"$a',
    'show "a\\"b" \'a"b\' a\\ b $\'a\\tb\' "\\$x \\x"',
    "show one\\\n  two \\\n  three\nshow 'a\\\nb' \"a\\\nb\"",
    "show a # comment 'quote\nshow b#c '#d'",
    "show a;show b&&show c;false||show d",
    'A=(1 "2 3" four)\nshow "${A[@]}" ${A[@]} "${A[*]}" ${#A[@]} ${A[1]} "x${A[@]}y"',
    'A=(a\n # comment ) with a bracket\n b # another\n)\nA+=(c d); A[1]=z\nshow "${A[@]}"',
    'E=(); show "${E[@]}" $E "" "$E" end',
    'declare -A M=([x]=1 [y]="2 3"); show "${M[x]}" "${M[y]}"',
    "n=$((1024 * 20)); show $n $(( (n + 1) / 2 )) $((n%7)) $((2**10)) $((-7/2)) $((n>3?1:0))",
    "i=3; show $((i++)) $i $((i+=2)) $i $((--i)) $((i<<2)) $((0x1f)) $((010))",
    "p=/a/b/c.tar.gz; show ${p##*/} ${p#*/} ${p%.*} ${p%%.*} ${p/b/X} ${p//\\//_} ${#p} ${p:3:2} ${p: -2}",
    'x=Ab; show ${x^^} ${x,,} ${x^} ${x,} ${x:+set} ${y:+set} ${x:-no} ${y:-d e} "${y:-d e}" ${y-"f  g"}',
    "show ${z:=5} $z; show ${z:-6}",
    'if [ 1 = 1 ]; then show yes; else show no; fi; if [[ a == b* || -z "" ]]; then show A; fi',
    "if [ 3 -gt 20 ]; then show no; elif [[ 3 < 20 ]]; then show text; else show number; fi",
    "for x in a 'b c' d; do show $x \"$x\"; done; for i in {1..3}; do show $i; done",
    "for ((i=0; i<3; i++)); do show $i; done; n=0; while [ $n -lt 2 ]; do show $n; n=$((n+1)); done",
    "case ab.c in x) show x;; a*|z) show star;; *) show other;; esac",
    'f() { local q=$1; shift; show "$q" "$@" $#; }; f a "b c" d; function g { show g$1; }; g 1',
    "x=1; (x=2; show $x); show $x; { x=3; }; show $x",
    ": <<EOF\nshow not\nEOF\n: <<-'X'\n\tshow not\n\tX\nshow after",
    'show $(basename /a/b.sh .sh) $(dirname /a/b) `basename /q/r` $(seq 2 2 6) "$(echo a  b)"',
    "show a 2>&1 > /dev/null; show b &> /dev/null; show c 2>/dev/null | cat",
    "eval \"show a 'b c'\"; c='show d e'; $c",
    'set -- p \'q r\'; show $# $1 "$2" "$@"; for a; do show "$a"; done',
    "! [ a = a ] && show no; ! [ a = b ] && show yes; true && show t; false || show f",
    'v=name; name=held; show ${!v}; unset name; show "[${name:-gone}]"',
    "x='[\"a\",\"b c\"]'; show k=$x \"k=$x\" l=['c','d']",
    'show "${HOMEX:-"in\'ner"}" "a${b:-${c:-deep $((1+1))}}z"',
    "x=5; if (( x > 3 )); then show big; fi; (( x += 1 )); show $x; while true; do show once; break; done",
    "for x in 1 2 3; do if [ $x = 2 ]; then continue; fi; show $x; done",
    "a=1 b=2; a+=3; export c=$a d=4; show $a $b $c $d; readonly e=5; show $e",
    "a=1; show pre{$a}post a=b=c --x=1 -y +z=2 ~key 50% @all",
    'if true; then\n  if false; then show a; else show b; fi\nfi; if [ -n "$nothing" ]; then show c; else show d; fi',
]


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_have_the_words_that_bash_gives(number: int) -> None:
    text = SNIPPETS[number]
    if text.startswith("show a 2>&1 > "):
        assert shown(text) == [["a"], ["b"], ["c"]]
        return
    assert shown(text) == shown_by_bash([text])[0]


def generated_word(pick: random.Random, depth: int = 0) -> str:
    """Return a word of random quoting and nesting over variables that the snippet sets and one that it does not."""
    pieces = [
        "a",
        "b-c",
        "k=v",
        "${x}",
        "${y}",
        '"$y"',
        "'$x \"q\"'",
        '"a $x ${A[1]}"',
        "\\$",
        "\\ ",
        "\\'",
        '"\\""',
        "$((x*3))",
    ]
    pieces += [
        "${A[@]}",
        '"${A[@]}"',
        '"${#A[@]}"',
        "${x:-no}",
        "'#'",
        "[1,2]",
        '"$((x + ${#y}))"',
        "$'t\\tb'",
        "${y// /_}",
        '"${y%% *}"',
    ]
    if depth < 2:
        inner = generated_word(pick, depth + 1)
        pieces += [f"${{unset:-{inner}}}", f"${{x:+{inner}}}", f"$(echo {inner})"]
        if not {"'", '"'} & set(inner):
            pieces.append(f'"${{unset:-{inner}}}"')
    return "".join(pick.choice(pieces) for _ in range(pick.randint(1, 3)))


def generated(pick: random.Random) -> str:
    words = " ".join(generated_word(pick) for _ in range(pick.randint(1, 4)))
    kinds = [
        f"show {words}",
        f'A=({words}); show "${{A[@]}}"',
        f'z={generated_word(pick)}; show "$z" $z',
        f'if [ "$x" -gt {pick.randint(0, 12)} ]; then show {words}; else show no; fi',
        f'for w in {words}; do show "$w"; done',
        f'f() {{ show "$2" $1 $#; }}; f {words}',
    ]
    return f"x={pick.randint(0, 12)}; y='two  words'; A=(i 'j k' l); {pick.choice(kinds)}"


def test_generated_words_are_those_of_bash() -> None:
    pick = random.Random(17)
    texts = [generated(pick) for _ in range(400)]
    for text, expected in zip(texts, shown_by_bash(texts), strict=True):
        assert shown(text) == expected, text


def test_generated_arithmetic_is_that_of_bash() -> None:
    pick = random.Random(5)

    def expression(depth: int) -> str:
        if depth == 0:
            return pick.choice(["x", "y", "3", "7", "0x10", "011", "(x+1)", "-2", "!x", "~y"])
        sign = pick.choice(["+", "-", "*", "/", "%", "<<", ">>", "<", ">=", "==", "!=", "&&", "||", "&", "|", "^"])
        right = pick.choice(["1", "2", "5"]) if sign in ("/", "%", "<<", ">>") else expression(depth - 1)
        text = f"{expression(depth - 1)} {sign} {right}"
        return f"({text})" if sign in ("<<", ">>") else text

    texts = [
        f"x={pick.randint(0, 9)}; y={pick.randint(0, 9)}; show $(({expression(2)} ? x : {expression(1)}))"
        for _ in range(200)
    ]
    texts += [f"x=9; y=4; show $(({expression(3)}))" for _ in range(200)]
    for text, expected in zip(texts, shown_by_bash(texts), strict=True):
        assert shown(text) == expected, text


def test_a_variable_that_is_never_set_is_unknown_and_named() -> None:
    (call,) = followed(
        'train a=$MODEL b="$DATA/train.parquet" c=${N:-8} d=$((N_GPUS * 2)) e=$1 f=${BASE##*/} g=${EMPTY:-}'
    ).calls
    assert [(word.text, word.unknown) for word in call.words[1:]] == [
        ("a=${MODEL}", ("MODEL",)),
        ("b=${DATA}/train.parquet", ("DATA",)),
        ("c=8", ()),
        ("d=$((N_GPUS * 2))", ("N_GPUS",)),
        ("e=${1}", ("argument 1",)),
        ("f=${BASE}", ("BASE",)),
        ("g=${EMPTY}", ("EMPTY",)),
    ]


def test_the_output_of_a_command_is_unknown_and_named() -> None:
    (call,) = followed('train n=$(nvidia-smi -L | wc -l) t="run_$(date +%s)" b=$(basename "$MODEL")').calls
    assert [(word.text, word.unknown) for word in call.words[1:]] == [
        ("n=$(nvidia-smi -L | wc -l)", ("$(nvidia-smi -L | wc -l)",)),
        ("t=run_$(date +%s)", ("$(date +%s)",)),
        ("b=$(basename ${MODEL})", ("MODEL",)),
    ]


def test_folders_of_the_person_stay_relative_to_them() -> None:
    assert shown("show $HOME/a ${PWD}/b $(pwd)/c $(cd $(dirname $0) && pwd)/d") == [["~/a", "./b", "./c", "./d"]]


def test_a_condition_that_only_a_run_decides_leaves_both_values() -> None:
    text = 'if nvidia-smi; then\n  n=8; A=(x)\nelse\n  n=4\nfi\nA+=(y)\ntrain n=$n m=$((n*2)) "${A[@]}"'
    call = followed(text).calls[-1]
    condition = ("line 1: if nvidia-smi",)
    assert [(word.text, word.others, word.depends) for word in call.words[1:]] == [
        ("n=8", ("n=4",), condition),
        ("m=16", ("m=8",), condition),
        ("x", (), condition),
        ("y", (), ()),
    ]


def test_a_check_that_ends_the_script_is_passed() -> None:
    text = 'if [ $# -lt 1 ]; then echo usage; exit 1; fi\n[ -z "$M" ] && exit 2\ncd /x || exit 1\ntrain $M'
    assert followed(text).calls[-1].words[1].unknown == ("M",)
    assert followed("exit 0\ntrain").calls == ()


def test_a_default_that_a_check_gives_is_kept() -> None:
    assert shown('if [ -z "$N" ]; then N=8; fi; show $N; [ -n "$M" ] || M=3; show $M') == [["8"], ["3"]]


def test_a_command_in_a_branch_says_its_condition() -> None:
    calls = followed("if curl x; then train a; fi\nother").calls
    assert [(call.words[0].text, call.depends) for call in calls] == [
        ("curl", ()),
        ("train", ("line 1: if curl x; then train a; fi",)),
        ("other", ()),
    ]


def test_words_carry_the_line_that_writes_them() -> None:
    call = followed('A=(\n  a=1\n  b=2\n)\ntrain c=3 \\\n  d=4 \\\n  "${A[@]}"').calls[0]
    assert [(word.text, word.line) for word in call.words] == [
        ("train", 5),
        ("c=3", 5),
        ("d=4", 6),
        ("a=1", 2),
        ("b=2", 3),
    ]


def test_a_text_for_another_shell_is_followed() -> None:
    calls = followed("x=1\nsrun -n 2 bash -lc \"train a=$x b='c d'\"\nssh host ls").calls
    assert [[word.text for word in call.words] for call in calls] == [["train", "a=1", "b=c d"], ["ssh", "host", "ls"]]


def test_scripts_beside_are_followed_and_others_are_named(tmp_path: Path) -> None:
    (tmp_path / "models.sh").write_text("M=(--layers 2)\n")
    got = follow(
        "source models.sh\n. gone.sh\nsource $X/y.sh\ntrain ${M[@]}",
        tmp_path / "run.sh",
        lambda name: tmp_path / name if name == "models.sh" else None,
    )
    assert [word.text for word in got.calls[0].words] == ["train", "--layers", "2"]
    assert [note.split(" is sourced")[0] for note in got.notes] == ["line 2: gone.sh", "line 3: ${X}/y.sh"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('train a=1 \\\n  "$@"', ["line 2"]), ("train $*", ["line 1"]), ('main() { train "$@"; }\nmain a=1', []),
        ('main() { train "$@"; }\nmain "$@"', ["line 2"]), ('set -- a=1\ntrain "$@"', []),
    ],
)  # fmt: skip
def test_settings_that_are_given_at_the_start_of_a_script_are_noted(text: str, lines: list[str]) -> None:
    notes = follow(text, Path("run.sh"), lambda name: None).notes
    assert [note.split(":")[0] for note in notes] == lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=1\ntrain 'x", "run.sh line 2: the quote ' is never closed"),
        ('a=1\n\ntrain "x $(y', "run.sh line 3: a ( is never closed"),
        ("if true; then train", "run.sh line 1: the if of line 1 has no fi"),
        ("for x in a; do train", "run.sh line 1: the for of line 1 has no done"),
        ("A=(a\nb\n", "run.sh line 3: the array of line 1 has no )"),
        ("train )", "run.sh line 1: ')' without its opening"),
        ("j=0; for ((i=0; i<1; j++)); do x=1; done", "more than 50000 commands"),
        ("f() { f; }; f", "30 deep"),
        ("x=ab; while [ $x != y ]; do x=$x$x; done", "x grows beyond 1048576 characters"),
        ('A=(a b); for i in {1..50}; do A+=("${A[@]}"); done', "A grows beyond 20000 items"),
        ("( " * 2000 + "x" + " )" * 2000, "too deep to read"),
    ],
)
def test_what_bash_could_not_run_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=None) as error:
        followed(text)
    assert message in str(error.value)


def test_random_cuts_of_scripts_never_crash() -> None:
    """Every prefix and every deletion of a script is followed or refused in one line."""
    text = "\n".join(SNIPPETS)
    pick = random.Random(3)
    for _ in range(300):
        start = pick.randrange(len(text))
        piece = text[start : start + pick.randint(1, 300)]
        try:
            followed(piece)
        except ConfigError as error:
            assert "\n" not in str(error)


SIDE_EFFECTS = """
touch {folder}/touched; echo x > {folder}/redirected; : >> {folder}/appended
A=$(touch {folder}/substituted; echo 1)
B=`touch {folder}/backquoted`
eval "touch {folder}/evaluated"
bash -c "touch {folder}/in_shell"
curl -o {folder}/fetched http://127.0.0.1:9/x
rm -rf {folder}/kept
cat <(touch {folder}/process) > {folder}/cat
C=${{IMPORT_TEST_SECRET}}; D=$(printenv IMPORT_TEST_SECRET); E=${{!IMPORT_TEST_*}}
source {folder}/.env
read F < {folder}/kept
trap "touch {folder}/trapped" EXIT
f() {{ touch {folder}/called; }}; f
printf -v G '%s' "$IMPORT_TEST_SECRET"
H=$(cat {folder}/kept); I=$((IMPORT_TEST_SECRET + 1)); J=$(< {folder}/kept)
python3 -c "open('{folder}/python', 'w')"
(touch {folder}/subshell) & wait
train a=$A b=$B c=$C d=$D e=$E f=$F g=$G h=$H i=$I j=$J k=$TOKEN_OF_ENV_FILE "$@"
"""


def test_a_script_full_of_side_effects_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "314159265358979"
    monkeypatch.setenv("IMPORT_TEST_SECRET", secret)
    (tmp_path / "kept").write_text(f"held {secret}")
    (tmp_path / ".env").write_text(f"TOKEN_OF_ENV_FILE={secret}")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    environment = dict(os.environ)
    monkeypatch.setattr("subprocess.Popen", None)
    monkeypatch.setattr("os.system", None)
    monkeypatch.setattr("socket.socket", None)
    got = followed(SIDE_EFFECTS.format(folder=tmp_path))
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before
    assert dict(os.environ) == environment
    assert secret not in repr(got)
    words = got.calls[-1].words
    assert words[0].text == "train"
    assert all(word.unknown for word in words[1:]), [word for word in words[1:] if not word.unknown]
