"""What an outbox holds, and how much of it."""

from dataclasses import dataclass
from typing import Literal

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.wire.messages import (
    IDEMPOTENCY_KEY,
    JSON_LENGTH_HEADER,
    InferRequest,
    decode_request,
    encode_request,
    json_length,
)

EntryKind = Literal["escalation", "telemetry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A request that waits to be sent.

    Attributes:
        key: the same for two requests that must not both take effect; sent with the request.
        kind: telemetry makes room for escalations, never the other way round.
        model: the server's model that is asked.
        body: the request as `wire.encode_request` wrote it.
        json_length: where the JSON of the body ends; None if it is JSON alone.
        created: seconds since 1970.
        failures: how often the server answered, but not with a reply.
    """

    key: str
    kind: EntryKind
    model: str
    body: bytes
    json_length: int | None
    created: float
    failures: int = 0

    @classmethod
    def of(cls, key: str, request: InferRequest, kind: EntryKind, created: float) -> "Entry":
        """Wrap a request.

        Raises:
            InputError: the key is empty.
            WireError: the request holds what the protocol cannot carry.
        """
        if not key:
            raise InputError("an outbox entry needs a key: give what makes the request unique")
        headers, body = encode_request(request)
        return cls(
            key=key,
            kind=kind,
            model=request.model,
            body=body,
            json_length=json_length(headers.get(JSON_LENGTH_HEADER)),
            created=created,
        )

    def request(self) -> InferRequest:
        """The request again, its key beside it, and as its id.

        Raises:
            WireError: the body was damaged.
        """
        found = decode_request(self.model, self.body, self.json_length)
        return InferRequest(
            model=found.model,
            inputs=found.inputs,
            parameters={**found.parameters, IDEMPOTENCY_KEY: self.key},
            id=self.key,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxRules:
    """How much an outbox holds, and for how long.

    Attributes:
        most_bytes: of all bodies together.
        most_entries: that wait; as many keys of sent ones are remembered.
        lives_s: seconds after which an entry is not worth sending, and a key that was sent may
            come again.
        busy_s: how long to wait for another process that writes.

    Raises:
        InputError: a value that is not above 0.
    """

    most_bytes: int = 64 << 20
    most_entries: int = 10_000
    lives_s: float = 86_400.0
    busy_s: float = 5.0

    def __post_init__(self) -> None:
        if min(self.most_bytes, self.most_entries, self.lives_s, self.busy_s) <= 0:
            raise InputError(f"an outbox cannot have these rules: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxCounts:
    """What waits, and what became of the rest since the outbox was made.

    Attributes:
        escalations, telemetry: entries that wait.
        waiting_bytes: of their bodies.
        sent: confirmed by the server.
        dropped_escalations, dropped_telemetry: for want of room.
        expired: too old to be sent.
        refused: taken out because the server would never take them.
    """

    escalations: int = 0
    telemetry: int = 0
    waiting_bytes: int = 0
    sent: int = 0
    dropped_escalations: int = 0
    dropped_telemetry: int = 0
    expired: int = 0
    refused: int = 0
