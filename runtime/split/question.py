"""A request to a model as HTTP, and its reply back."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote

from edgeclip.runtime.split.deadline import Deadline
from edgeclip.runtime.split.errors import BadReplyError, WrongSpaceError
from edgeclip.runtime.split.http_exchange import HttpReply, HttpRequest
from edgeclip.runtime.wire.messages import (
    DEADLINE_MS,
    JSON_LENGTH_HEADER,
    SPACE_ID,
    InferRequest,
    InferResponse,
    WireError,
    decode_response,
    encode_request,
    json_length,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Question(Generic[T]):
    """What a model is asked.

    Attributes:
        request: see `Server.ask`.
        deadline: see `Server.ask`.
        read: see `Server.ask`.
    """

    request: InferRequest
    deadline: Deadline
    read: Callable[[InferResponse], T]

    def http_request(self) -> HttpRequest:
        """What is sent at this moment.

        Raises:
            WireError: the request holds what the protocol cannot carry.
        """
        left = {DEADLINE_MS: self.deadline.left() * 1e3}
        headers, body = encode_request(
            dataclasses.replace(self.request, parameters={**self.request.parameters, **left})
        )
        path = f"/v2/models/{quote(self.request.model, safe='')}/infer"
        return HttpRequest(method="POST", path=path, headers=headers, body=body)

    def answer(self, reply: HttpReply) -> T:
        """What `read` makes of the reply.

        Raises:
            BadReplyError: it is not of the protocol, or `read` refuses it.
            WrongSpaceError: it is of another embedding space than the request.
        """
        try:
            length = json_length(reply.headers.get(JSON_LENGTH_HEADER.lower()))
            response = decode_response(reply.body, length)
        except WireError as error:
            raise BadReplyError(f"the server's reply cannot be read: {error}") from error
        _check_space(self.request, response)
        return self.read(response)


def _check_space(request: InferRequest, response: InferResponse) -> None:
    wanted = request.parameters.get(SPACE_ID)
    found = response.parameters.get(SPACE_ID)
    if wanted is not None and found != wanted:
        theirs = "no embedding space" if found is None else f"the embedding space {str(found)[:12]}"
        raise WrongSpaceError(
            f"model {request.model} of the server has {theirs}, not {str(wanted)[:12]}: serve a "
            "bundle of this space"
        )
