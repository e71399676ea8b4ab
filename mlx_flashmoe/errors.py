"""The errors a user can meet. Each says what was wrong, where, and what to do.

The command line prints them as one line and exits with status 2; nothing else is caught.
"""


class FlashMoEError(Exception):
    """Base of every error this package raises on purpose."""


class SourceError(FlashMoEError):
    """The checkpoint to convert is not usable: missing, malformed, truncated or unsupported."""


class ConversionError(FlashMoEError):
    """The conversion cannot be done as asked: options that do not fit, DST in use, no space left."""


class FormatError(FlashMoEError):
    """A converted folder is incomplete, damaged, or of another format version."""


class ReadError(FlashMoEError):
    """Reading an expert's blob failed. Names the file, the layer and the expert."""


class MemoryPlanError(FlashMoEError):
    """What was asked for does not fit in the memory there is."""


class RequestError(FlashMoEError):
    """A request cannot be served: an empty prompt, a sampling value out of range, no chat template."""
