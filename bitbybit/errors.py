"""The package's exceptions: one base class, a subclass where callers branch on it."""


class BitbybitError(Exception):
    """Base of every error that a user can cause; its message is one clear line."""


class ConfigError(BitbybitError, ValueError):
    """A hash configuration or a training option that cannot be used as given."""


class CheckpointError(BitbybitError):
    """A checkpoint that is missing, damaged, or belongs to another architecture."""


class CheckpointWarning(UserWarning):
    """What a checkpoint does not say had to be assumed."""


class DataError(BitbybitError):
    """A data set that is missing, damaged, or of another shape than expected."""


class DivergenceError(BitbybitError):
    """Training produced a loss or an activation that is not finite."""
