"""The one error a user of this library is expected to see."""


class LowRankError(ValueError):
    """Bad input: the message names the module or file, says what is wrong with it and what to do."""
