"""Everything this library raises on purpose.

* OuroborosError
  * OptionError (also ValueError): an option is out of range or contradicts another
  * PromptError: a prompt that cannot be answered
    * ContextLengthError: longer than the model's context
  * ModelError
    * UnknownModelError: no such registry name, folder or hub id
    * ModelDownloadError: the weights cannot be had
    * TokenizerMismatchError: draft and target models do not share a vocabulary
  * SnapshotError: a session cannot be written to a file, or not be read from it
  * StoreError: a phrase store cannot be used
    * StoreUnavailableError: its database does not answer now, but may later
  * QueueFullError: too many requests wait for a model already
  * RequestTimeoutError (also TimeoutError): an answer took longer than its caller allowed
  * MemoryLimitError (also MemoryError): there is no memory for the keys and values of an answer
  * MissingExtraError (also ImportError): an optional dependency is not installed
  * LibraryVersionError (also ImportError): a dependency is of a version that lacks a name needed of it
"""


class OuroborosError(Exception):
    """Base of every error below."""


class OptionError(OuroborosError, ValueError):
    """An option is out of range, of the wrong type, or contradicts another."""


class PromptError(OuroborosError):
    """The prompt cannot be answered: empty, or of a type nothing can be made of.

    Not a ValueError: frameworks take those for a reply that cannot be read, and go on without an answer.
    """


class ContextLengthError(PromptError):
    """The prompt leaves no room in the model's context."""


class ModelError(OuroborosError):
    """A model cannot be found, fetched or used."""


class UnknownModelError(ModelError):
    """The name is neither a registry name nor a folder nor a hub id that can be reached."""


class ModelDownloadError(ModelError):
    """The weights of a known model could not be fetched, or did not match their hash."""


class TokenizerMismatchError(ModelError):
    """Draft model and target model do not share a vocabulary, so drafts would be noise."""


class SnapshotError(OuroborosError):
    """A session cannot be written to a file, or the file is of another model, tokenizer or scope, or damaged."""


class StoreError(OuroborosError):
    """A phrase store cannot be opened or used."""


class StoreUnavailableError(StoreError):
    """The database of a phrase store does not answer now: locked, stopped, full. Later it may."""


class QueueFullError(OuroborosError):
    """As many requests wait for the model as may; nothing was done for this one."""

    def __init__(self, unfinished: int, max_active: int, max_waiting: int) -> None:
        super().__init__(
            f"the model has {unfinished} requests already; {max_active} may take turns and {max_waiting} wait; "
            "ask again later, close streams that nobody reads, or raise max_waiting"
        )


class RequestTimeoutError(OuroborosError, TimeoutError):
    """An answer took longer than its `timeout`. What was said until then is learned all the same."""

    def __init__(self, timeout: float, *, waiting: bool) -> None:
        """`waiting`: whether it was still waiting for a place among those that take turns."""
        when = "while the request waited behind others" if waiting else "before the answer was complete"
        super().__init__(f"timeout={timeout:g} seconds passed {when}")


class MemoryLimitError(OuroborosError, MemoryError):
    """There is no memory for what an answer needs; the message says how much, and what would help."""


class MissingExtraError(OuroborosError, ImportError):
    """An optional dependency is missing; the message names the command that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed; install it with: pip install "ouroboros-llm[{extra}]"')


class LibraryVersionError(OuroborosError, ImportError):
    """A dependency is of a version that lacks a name needed of it; the message says which, and what was tested."""
