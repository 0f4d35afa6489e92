"""What can go wrong, by who must act. Every message says the numbers, the rule and the remedy."""


class DapoError(Exception):
    """Base of every error that dapo_mcore raises on purpose."""


class OtherRankFailed(DapoError):
    """Not here but on a rank that this one waits for."""


class ConfigError(DapoError):
    """The configuration contradicts itself, the model or the machine: the user edits a value."""


class DataError(DapoError):
    """A prompt file or row is unusable; the message names the file and the row."""


class RewardError(DapoError):
    """A reward function cannot be loaded or called at all (one sample's failure is a counted outcome instead)."""


class RolloutError(DapoError):
    """Generation cannot go on, for instance because no group of answers varies."""


class UpdateBroken(RolloutError):
    """A weight update has reached no server, but some can take another: all ranks repeat it (weights/sync.py)."""


class TrainingError(DapoError):
    """Gradient steps do not work: gradients are never finite, or copies of one parameter differ between ranks."""


class ResourceError(DapoError):
    """The machine has too little memory for what the configuration asks of it."""


class CheckpointError(DapoError):
    """A checkpoint or model folder is missing, incomplete or does not fit the model."""


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, truncated or changed; an older checkpoint may still be whole."""


def listed(values: list[int]) -> str:
    """The values as a message offers them: `1, 2 or 4`."""
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last
