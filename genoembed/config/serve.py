"""Options of the server: which vectors it makes, what a request may hold, and where it listens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from genoembed.config.choices import Fusion, GapPolicy, TokenPooling
from genoembed.config.embed import (
    VECTORS,
    EmbeddingConfig,
    ModelConfig,
    PolicyConfig,
    WindowConfig,
)
from genoembed.config.fields import Config, option, same_option
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS, LIMITS = "Server", "Limits"
PACKAGES = ("starlette", "uvicorn")
"""What answers HTTP: the extra ``serve``."""


class ServedVectors(EmbeddingConfig):
    """How a sequence becomes one vector."""

    pooling: TokenPooling = same_option(
        EmbeddingConfig, "pooling", help="How to pool the token vectors of a sequence into one vector."
    )
    fusion: Fusion = same_option(
        EmbeddingConfig, "fusion", help="How to combine several layers. A reply holds one vector."
    )
    normalize: bool = option(
        False, group=VECTORS, basic=True, help="Scale vectors to length 1. Dot products are then cosines."
    )
    transform: str | None = option(
        None,
        group=VECTORS,
        metavar="FILE.h5",
        help="Transform made by fit-transform. It is applied to each vector.",
        reads=True,
    )

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if len(self.layers) > 1 and self.fusion == "none":
            yield Problem(
                f"{len(self.layers)} layers give as many vectors per sequence, but a reply holds one",
                Remedy("fusion", "concat"),
            )


class ServedWindows(Config):
    """How sequences longer than the context are cut."""

    window: int | None = same_option(WindowConfig, "window", basic=False)
    stride: int | None = same_option(WindowConfig, "stride")
    carry_state: bool = same_option(WindowConfig, "carry_state")

    def _problems(self) -> Iterator[str]:
        # what goes together is checked where it is described
        yield from WindowConfig(window=self.window, stride=self.stride)._problems()


class RequestConfig(Config):
    """What a request may hold, and how many may wait."""

    invalid: Literal["error", "mask"] = same_option(
        PolicyConfig,
        "invalid",
        basic=False,
        help="Letters outside the IUPAC DNA alphabet: reject the request, or mask each letter (read it "
        "as N).",
    )
    gaps: GapPolicy = same_option(
        PolicyConfig, "gaps", help="Gap letters (- . *): reject the request, or remove them."
    )
    keep_case: bool = same_option(PolicyConfig, "keep_case")
    max_bases: int = option(
        1_000_000,
        ge=1,
        unit="bases",
        group=LIMITS,
        basic=True,
        metavar="BASES",
        help="Length of the longest sequence that is accepted.",
    )
    max_inputs: int = option(
        2048,
        ge=1,
        unit="sequences",
        group=LIMITS,
        metavar="N",
        help="Maximum number of sequences per request.",
    )
    max_body: int = option(
        32_000_000,
        ge=1,
        unit="bytes",
        group=LIMITS,
        metavar="BYTES",
        help="Size of the largest request. Larger ones are rejected before they are read.",
    )
    max_queue: int = option(
        256,
        ge=1,
        unit="requests",
        group=LIMITS,
        basic=True,
        metavar="N",
        help="Maximum number of requests at a time. Further ones are answered with status 503 and "
        "Retry-After.",
    )


class AddressConfig(Config):
    """Where the server listens."""

    host: str = option(
        "127.0.0.1",
        group=ADDRESS,
        basic=True,
        metavar="HOST",
        help="Address to listen on. The default is reachable from this machine only; the server "
        "has no password.",
    )
    port: int = option(
        8000,
        ge=0,
        le=65535,
        group=ADDRESS,
        basic=True,
        metavar="PORT",
        help="Port to listen on. 0: any free port.",
    )
    dry_run: bool = option(
        False,
        group=ADDRESS,
        help="Write nothing. Load the model, embed one sequence, print the address, model and "
        "layers, and stop.",
    )


class ServeConfig(Config):
    """One server."""

    address: AddressConfig
    model: ModelConfig
    embedding: ServedVectors
    windows: ServedWindows
    requests: RequestConfig
