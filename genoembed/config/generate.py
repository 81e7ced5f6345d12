"""Options of generation: how prompts are continued."""

from __future__ import annotations

from genoembed.config.choices import ComputeDtype, FailurePolicy, StartChoice
from genoembed.config.embed import INPUT, MODEL, OUTPUT, ModelConfig, PolicyConfig, TableOutput
from genoembed.config.fields import option, same_option

SEQUENCES, DRAWS = "Sequences", "Sampling"


class GenerateConfig(ModelConfig, PolicyConfig):
    """How prompts are continued, and where the sequences go."""

    inputs: tuple[str, ...] = option(
        argument=True,
        metavar="PROMPTS",
        help="Sequence files in any format of extract; - is standard input.",
        reads=True,
    )
    dtype: ComputeDtype = option(
        "float32",
        group=MODEL,
        basic=True,
        help="Type of weights and activations. In half precision, sequences depend on how many are "
        "generated together.",
    )
    num_samples: int = option(
        1,
        ge=1,
        unit="sequences",
        group=SEQUENCES,
        basic=True,
        short="-n",
        metavar="N",
        help="Number of sequences per prompt.",
    )
    length: int = option(
        500,
        ge=1,
        unit="bases",
        group=SEQUENCES,
        basic=True,
        metavar="BASES",
        help="Bases to generate per sequence. A last token of several bases may exceed it.",
    )
    stop_at_end: bool = option(
        True,
        group=SEQUENCES,
        help="End a sequence where the model predicts the end of a document. Otherwise that token is "
        "never sampled.",
    )
    start_token: StartChoice = option(
        "auto",
        group=SEQUENCES,
        help="Token that the model reads before the first base. auto: the token that starts a sequence "
        "in training. none: no token.",
    )
    tag: str | None = option(
        None,
        group=SEQUENCES,
        metavar="TEXT",
        help="Text that the model reads before each prompt, such as the lineages that Evo models know.",
    )
    temperature: float = option(
        1.0,
        ge=0,
        group=DRAWS,
        basic=True,
        metavar="X",
        help="Sampling temperature. Below 1 favors likely tokens, above 1 unlikely ones; 0 always "
        "takes the most likely token.",
    )
    top_k: int | None = option(
        None,
        ge=1,
        unit="tokens",
        group=DRAWS,
        basic=True,
        metavar="N",
        shown_default="all",
        help="Sample from the N most likely tokens only.",
    )
    top_p: float = option(
        1.0,
        gt=0,
        le=1,
        group=DRAWS,
        basic=True,
        metavar="P",
        help="Sample from the smallest set of tokens whose probabilities sum to P.",
    )
    seed: int = option(0, ge=0, group=DRAWS, basic=True, metavar="N", help="Random seed.")
    batch_rows: int = option(
        32,
        ge=1,
        unit="sequences",
        group=MODEL,
        metavar="N",
        help="Sequences or windows per forward pass. Fewer need less memory.",
    )
    cache: bool = option(
        True,
        group=MODEL,
        help="Keep the model's state (key-value cache) between tokens. Without it, each token needs a "
        "pass over the whole sequence.",
    )
    on_error: FailurePolicy = option(
        "stop",
        group=INPUT,
        basic=True,
        help="If a prompt fails (out of memory, values that are not finite, too short, mostly unread): "
        "stop, or skip it. A skipped prompt gets a record without bases, and the exit code is 3.",
    )
    output: str | None = same_option(TableOutput, "output", help="FASTA file to write.", writes="fasta")
    with_prompt: bool = option(False, group=OUTPUT, help="Write the prompt in front of each sequence.")
    overwrite: bool = same_option(TableOutput, "overwrite")
