"""The two ways a command can fail on purpose: it cannot start as given (exit 2), or it started and failed (exit 1)."""


class UsageError(Exception):
    """The command cannot start as given. The message is one sentence: the value received and the remedy."""


class RunError(Exception):
    """The command started and could not go on. The message is one sentence: what happened, what is kept, the remedy."""
