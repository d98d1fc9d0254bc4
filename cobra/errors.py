"""Errors of the package: one base class, so that a caller can catch whatever a bad input causes with one `except`.

The kernels raise their own classes (`cobra_kernels.errors`): a bad tensor is a programming error, a bad file is not.
"""


class CobraError(Exception):
    """Base of every error that `cobra` raises for its inputs."""


class ImageError(CobraError, ValueError):
    """The image is not one of the accepted formats, is damaged, or is over a limit."""


class CheckpointError(CobraError, ValueError):
    """A config, tokenizer or weight file is missing, malformed, or does not describe the model it claims to."""


class PromptError(CobraError, ValueError):
    """A turn is out of order, or a prompt does not fit or cannot be tokenised."""


class RequestError(CobraError, ValueError):
    """An argument of a generation request is out of range."""
