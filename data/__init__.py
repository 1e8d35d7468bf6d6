"""Text and examples -> token files -> batch t."""


class DataError(Exception):
    """Data that is missing, broken or unusable; the message is one sentence that says what to do."""
