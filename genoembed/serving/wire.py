"""What goes over the wire: a request's JSON in, records and replies out, all in the form of OpenAI's API.

Promised: whatever the bytes of a request are, they give records or a :class:`RequestError` that says which
key, input and letter is wrong. Nothing here knows a model or a connection.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from genoembed.errors import InputError, visible
from genoembed.sequences.compression import WHITESPACE
from genoembed.sequences.reading import clean_record
from genoembed.sequences.records import IdRegistry, InputCounts, RawRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from genoembed.contracts import SequenceRecord
    from genoembed.sequences.records import Policies

BAD_REQUEST, NOT_FOUND, TOO_LARGE, UNAVAILABLE = 400, 404, 413, 503
KEYS = ("input", "model", "encoding_format", "dimensions", "user")
"""What a request may hold."""
_SHOWN = 80
"""Characters of a value of the request that a message repeats."""


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        message: What was found, what was expected, what to do.
        status: Of HTTP.
        param: Key of the request that is wrong.
        code: One word for programs.
        retry_after_s: When the same request may succeed.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = BAD_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s
        super().__init__(visible(message))

    def body(self) -> bytes:
        """Write the reply's body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a request may ask for."""

    model: str
    """The only model that there is."""
    width: int
    """Numbers of a vector."""
    policies: Policies
    max_bases: int
    """Of a sequence."""
    max_inputs: int
    """Sequences of a request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingRequest:
    """A checked request."""

    records: tuple[SequenceRecord, ...]
    is_single: bool
    """Whether ``input`` was one sequence, not a list."""
    is_base64: bool
    """Whether vectors are sent as base64 of little-endian float32; else as lists of numbers."""


def read_embedding_request(body: bytes, limits: Limits, *, name: str) -> EmbeddingRequest:
    """Check a request and take its sequences.

    Args:
        body: As it was received.
        limits: What it may ask for.
        name: Of the request; records are called ``NAME:INDEX``, which is how the log speaks of them.

    Returns:
        The request.

    Raises:
        RequestError: If anything is wrong with it.
    """
    values = _object(body)
    unknown = [key for key in values if key not in KEYS]
    if unknown:
        message = f"unknown key {_shown(unknown[0])}; expected {', '.join(KEYS)}"
        raise RequestError(message, param=unknown[0][:_SHOWN], code="unknown_key")
    # null is how some clients spell "not given"
    given = {key: value for key, value in values.items() if value is not None}
    _check_model(given.get("model", limits.model), limits)
    form = given.get("encoding_format", "float")
    if form not in ("float", "base64"):
        message = f"encoding_format is {_shown(form)}; set it to float or base64"
        raise RequestError(message, param="encoding_format")
    width = given.get("dimensions", limits.width)
    if type(width) is not int or width != limits.width:
        message = (
            f"dimensions is {_shown(width)}, but the vectors of this model have {limits.width} numbers and "
            "are not shortened; leave it out"
        )
        raise RequestError(message, param="dimensions")
    if not isinstance(given.get("user", ""), str):
        message = f"user is {_shown(given['user'])}, expected a string; leave it out"
        raise RequestError(message, param="user")
    texts = _texts(given.get("input"), limits)
    is_single = isinstance(given["input"], str)
    places = ["input"] if is_single else [f"input[{index}]" for index in range(len(texts))]
    records = tuple(
        _record(text, place, limits, f"{name}:{index}")
        for index, (text, place) in enumerate(zip(texts, places, strict=True))
    )
    return EmbeddingRequest(records=records, is_single=is_single, is_base64=form == "base64")


def _object(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except RecursionError:
        message = "the body is nested too deeply; send one JSON object"
        raise RequestError(message, code="invalid_json") from None
    except ValueError as error:  # of JSON, of UTF-8, of numbers with too many digits
        message = f"the body is not valid JSON ({str(error)[:_SHOWN]}); send one JSON object in UTF-8"
        raise RequestError(message, code="invalid_json") from None
    if not isinstance(values, dict):
        message = f"the body is {_shown(values)}, expected a JSON object with the key input"
        raise RequestError(message, code="invalid_json")
    return values


def _check_model(model: object, limits: Limits) -> None:
    if not isinstance(model, str):
        message = f"model is {_shown(model)}, expected a string; set it to {limits.model!r} or leave it out"
        raise RequestError(message, param="model")
    if model != limits.model:
        message = f"model {_shown(model)} is not served here; set model to {limits.model!r} or leave it out"
        raise RequestError(message, status=NOT_FOUND, param="model", code="model_not_found")


def _texts(value: object, limits: Limits) -> list[str]:
    if value is None:
        message = "input is missing; set it to a sequence, or to a list of sequences"
        raise RequestError(message, param="input")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        message = f"input is {_shown(value)}, expected a sequence, or a list of sequences"
        raise RequestError(message, param="input")
    if not texts:
        message = "input is an empty list; give at least one sequence"
        raise RequestError(message, param="input")
    if len(texts) > limits.max_inputs:
        message = (
            f"input holds {len(texts)} sequences, but a request may hold {limits.max_inputs}; send several "
            "requests"
        )
        raise RequestError(message, param="input", code="too_many_inputs")
    for index, text in enumerate(texts):
        if isinstance(text, int | list) and not isinstance(text, bool):
            message = (
                f"input[{index}] is {_shown(text)}: token ids are not taken; give the sequence's letters"
            )
            raise RequestError(message, param="input")
        if not isinstance(text, str):
            message = f"input[{index}] is {_shown(text)}, expected a sequence as a string"
            raise RequestError(message, param="input")
    return texts


def _record(text: str, place: str, limits: Limits, record_id: str) -> SequenceRecord:
    if not text.isascii():
        position, letter = next((at, one) for at, one in enumerate(text, start=1) if ord(one) > 127)
        message = (
            f"{place}: {_visible_letter(letter)} at position {position} is no letter of DNA or RNA; fix it"
        )
        raise RequestError(message, param="input", code="invalid_letter")
    letters = text.encode("ascii")
    if not letters.translate(None, WHITESPACE):
        message = f"{place} is empty; give its bases, or leave it out"
        raise RequestError(message, param="input", code="empty_input")
    raw = RawRecord(record_id, "", "request", "request", None, iter([(letters, None)]))
    try:
        # a registry and counts of its own: ids are numbered, and nobody asks how much was upper-cased
        record = clean_record(raw, policies=limits.policies, ids=IdRegistry("error"), counts=InputCounts())
    except InputError as error:
        message = f"{place}: {_for_clients(error.problem)}"
        raise RequestError(message, param="input", code="invalid_letter") from None
    assert record is not None, "no policy skips"
    if len(record.sequence) > limits.max_bases:
        message = (
            f"{place} has {len(record.sequence)} bases, but a sequence may have {limits.max_bases}; cut it, "
            "or start the server with a higher --max-bases"
        )
        raise RequestError(message, param="input", code="input_too_long")
    return record


def _visible_letter(letter: str) -> str:
    return repr(letter) if letter.isprintable() else f"U+{ord(letter):04X}"


def _for_clients(problem: str) -> str:
    """Phrase a remedy for who sends requests: policies are the server's, and none of its own skips records.

    Example:
        >>> _for_clients("'J' at position 4 is wrong; set invalid='mask' or fix it")
        "'J' at position 4 is wrong; start the server with --invalid mask or fix it"
        >>> _for_clients("has no bases; set empty='skip' or remove it")
        'has no bases; remove it'
    """
    without_skips = re.sub(r"(,? or )?\bset \w+='skip'( or )?", "", problem)
    return re.sub(r"\bset (\w+)='(\w+)'", r"start the server with --\1 \2", without_skips)


def _shown(value: object) -> str:
    """Show a value of the request as JSON has it, shortened."""
    if isinstance(value, Mapping | list):
        return "an object" if isinstance(value, Mapping) else "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def embeddings_reply(
    vectors_ND: NDArray[np.float32], *, model: str, num_tokens: int, is_base64: bool
) -> bytes:
    """Write the reply to a request of N sequences, with vectors of D numbers."""
    embeddings: Sequence[object]
    if is_base64:
        embeddings = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors_ND]
    else:
        embeddings = vectors_ND.tolist()
    data = [
        {"object": "embedding", "index": index, "embedding": embedding}
        for index, embedding in enumerate(embeddings)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    reply = {"object": "list", "data": data, "model": model, "usage": usage}
    return json.dumps(reply, separators=(",", ":"), allow_nan=False).encode()
