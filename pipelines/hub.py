"""Why something could not be had from the Hub, in the words of what a user can do."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def reason(name: str, error: BaseException) -> str:
    """What kept the repository `name` away; `error` is whatever a library raised over it."""
    causes = list(_causes(error))

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if has(OfflineModeIsEnabled) or (constants.HF_HUB_OFFLINE and has(LocalEntryNotFoundError)):
        return "HF_HUB_OFFLINE is set, and the Hub's cache does not have it; unset it once to download it"
    if has(GatedRepoError):
        return f"access to it is restricted: accept its terms at https://huggingface.co/{name} and {LOG_IN}"
    if has(RepositoryNotFoundError):
        return f"the Hub has no such repository, or a private one: check the name, or {LOG_IN}"
    if has(RevisionNotFoundError):
        return "it has no such revision (branch, tag or commit)"
    if has(RemoteEntryNotFoundError):
        return "it is there, but without the file that was looked for"
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    if has(LocalEntryNotFoundError, ConnectionError) or "TransportError" in names:  # of whichever HTTP library
        return "the Hub cannot be reached, and its cache here does not have it; without a network, give a folder"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised over."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
