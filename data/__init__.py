"""Text and examples -> token files -> batch t."""


class DataError(Exception):
    """Data that is missing, broken or of no use here; the message is one sentence that says what to do."""
