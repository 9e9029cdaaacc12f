"""An exception that goes back to the Hub or the way to it → one line that says what to do, and never a token."""

from collections.abc import Iterator

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")  # the client has changed them, and may again


def hub_problem(error: BaseException) -> str | None:
    """What the Hub, or the way to it, has to do with an error; None if it is something else."""
    for cause in _causes(error):
        if isinstance(cause, HFValidationError):
            return f"repositories are called 'user/name': {one_line(cause)}"
        if isinstance(cause, HfHubHTTPError):
            return _refused(cause)
        if type(cause).__module__.partition(".")[0] in HTTP_LIBRARIES or isinstance(cause, ConnectionError):
            return f"the Hub cannot be reached, or the connection broke off ({one_line(cause)})"
    return None


def _refused(error: HfHubHTTPError) -> str:
    status, said = error.response.status_code, error.server_message or one_line(error)
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and the token, if there is one, may not see it"
    if status == 401:
        return "the Hub does not accept the token (401): log in again with 'hf auth login', or set HF_TOKEN"
    if status == 403:
        return f"the token lacks the rights for it (403: {said})"
    return f"the Hub failed ({status}: {said})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was explicitly raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def one_line(error: BaseException) -> str:
    """The first line of a message, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
