"""``genoembed serve``: embeddings over HTTP, in the form of OpenAI's API."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import genoembed
from genoembed.cli.options import command
from genoembed.cli.output import count, duration, echo_result
from genoembed.config.serve import PACKAGES, ServeConfig

if TYPE_CHECKING:
    from genoembed import ServedModel

_logger = logging.getLogger(__name__)


@command(
    "serve",
    ServeConfig,
    short_help="Serve embeddings over HTTP.",
    examples="""
    genoembed serve --model evo2_7b --layer 28 --port 8000
    curl http://127.0.0.1:8000/v1/embeddings -H "Content-Type: application/json" -d '{"input": "ACGT"}'""",
    has_json=True,
    packages=PACKAGES,
)
def serve_command(*, as_json: bool, **options: Any) -> None:
    """Serve embeddings over HTTP, in the form of OpenAI's API, until Ctrl-C or SIGTERM.

    The vectors are those of extract with the same options. Sequences of different requests share forward
    passes. When the server is ready, standard output gets one line: its address, the model, the layers and
    the width.
    """

    def tell(served: ServedModel) -> None:
        text = f"{served.url}: {served.model}, {', '.join(served.layers)}, {count(served.width, 'feature')}"
        echo_result(served, text, as_json=as_json)

    report = genoembed.serve(on_ready=tell, **options)
    if report.signal is not None:
        _logger.info(
            "stopped by %s after %s: %s, %s without a vector; %s, %s",
            report.signal,
            duration(report.seconds),
            count(report.requests, "request"),
            f"{report.errors:,}",
            count(report.sequences, "sequence"),
            count(report.tokens, "token"),
        )
