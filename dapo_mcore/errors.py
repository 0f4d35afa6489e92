"""All errors of the project, by who must act. Every message gives the numbers, the rule and the remedy."""

import errno
from collections.abc import Sequence

_LONGEST_TEXT = 1000


class DapoError(Exception):
    """Base of every error that dapo_mcore raises on purpose."""


class OtherRankFailed(DapoError):
    """Another rank failed, and this rank waited for it."""


class RestartError(DapoError):
    """A job has failed twice from the same checkpoint; a third start would fail as well."""


class ConfigError(DapoError):
    """The configuration contradicts itself, the model or the machine: the user edits a value."""


class DataError(DapoError):
    """A prompt file or row is unusable; the message names the file and the row."""


class RewardError(DapoError):
    """A reward function cannot be loaded or called at all (one sample's failure is a counted outcome instead)."""


class ToolError(DapoError):
    """A tool cannot be used at all, or no sandbox holds (one call's failure is a result that the policy sees instead)."""


class RolloutError(DapoError):
    """Generation cannot go on, for instance because no group of answers varies."""


class UpdateBroken(RolloutError):
    """No server received the weight update, but some are still alive. All ranks must send it again (handover.py)."""


class TrainingError(DapoError):
    """Gradient steps do not work: gradients are never finite, or copies of one parameter differ between ranks."""


class ResourceError(DapoError):
    """The machine has too little memory for what the configuration asks of it."""


class CheckpointError(DapoError):
    """A checkpoint or model folder is missing, incomplete or does not fit the model."""


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, truncated or changed; an older checkpoint may still be whole."""


class RecordError(DapoError):
    """A record of a run is missing or damaged, or its steps cannot be repeated here."""


class OutputError(DapoError):
    """The operating system refuses a file of the run: the user makes room, gives rights, or chooses another place."""


REFUSALS = {
    errno.ENOSPC: "free some space there, or choose another output_dir",
    errno.EDQUOT: "free some of your quota there, or choose another output_dir",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another output_dir",
    errno.EROFS: "mount it for writing, or choose another output_dir",
    errno.EACCES: "give yourself the right to write there, or choose another output_dir",
    errno.EPERM: "give yourself the right to write there, or choose another output_dir",
    errno.EEXIST: "a file is in the place of a folder: move it away, or choose another output_dir or name",
    errno.ENOTDIR: "a file is in the place of a folder: move it away, or choose another output_dir or name",
    errno.EISDIR: "a folder is in the place of a file: move it away, or choose another output_dir or name",
    errno.ENAMETOOLONG: "choose a shorter name or output_dir",
    errno.EIO: "the disk or its network fails: choose another output_dir",
    errno.ESTALE: "the disk or its network fails: choose another output_dir",
    errno.EBUSY: "something else uses it: end that, or move it away",
}
"""What to do, by the number of an OSError. Any other OSError is our own mistake and keeps its traceback."""


def output_error(error: OSError, doing: str) -> Exception:
    """Return the OutputError that says what was being done, what the system answered and what to do; `error` itself if it
    is no refusal. Example: cannot save the metrics: No space left on device: 'runs/a/metrics.jsonl'; free some space …"""
    remedy = REFUSALS.get(error.errno)
    if remedy is None:
        return error
    where = f": {error.filename}" if error.filename else ""
    return OutputError(f"cannot {doing}: {error.strerror}{where}; {remedy}")


def listed(values: Sequence[object]) -> str:
    """Return the values as text for a message: `1, 2 or 4`."""
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last


def shortened(text: str, longest: int = 80) -> str:
    """Return the text, shortened to at most `longest` characters."""
    return text if len(text) <= longest else f"{text[:longest]}…"


def one_line(value: object, longest: int = 300) -> str:
    """Return an error's message, or a value's text, in one line, shortened; the error's type if it has no message."""
    return shortened(" ".join(str(value).split()) or type(value).__name__, longest)


def describe_error(error: BaseException) -> str:
    """Return `ValueError: no`, one line of bounded length, even if the exception's `__str__` raises."""
    try:
        text = str(error)
    except Exception as second:
        text = f"its text raised {type(second).__name__}"
    return " ".join(f"{type(error).__name__}: {text}".split())[:_LONGEST_TEXT].removesuffix(":")
