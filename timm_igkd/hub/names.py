"""What is a name of a repository on the Hub."""

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def is_repo_id(text: str) -> bool:
    """Return whether a text is name or user/name, as the Hub's client takes it."""
    if not (text.isascii() and text.isprintable()):  # the client of 1.x takes letters of any alphabet, and a line's end
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
