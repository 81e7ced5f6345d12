"""`generate` against a loop over plain transformers, with and without a state, in any batch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import genoembed
from genoembed.errors import (
    ConfigError,
    ModelError,
    NonFiniteError,
    UnreadError,
)
from genoembed.generation.sampler import (
    GeneratorOptions,
    SamplingOptions,
    SequenceGenerator,
    uniforms,
)
from genoembed.models.language_model import Continuation, LanguageModel
from genoembed.tokenization.hf import letter_tokens
from genoembed.tokenization.kmer import KmerTokenizer
from tests.by_hand import random_dna
from tests.oracles import drawable_probabilities, inverse_cumulative
from tests.scoring.by_plain_torch import CAUSAL, folder_of, loaded, plain, start_id

PROMPTS = {"a": random_dna(9, 1), "b": random_dna(9, 2), "c": random_dna(14, 3), "d": random_dna(7, 4)}


def write(folder, prompts=PROMPTS):
    path = folder / "prompts.fa"
    path.write_text("".join(f">{name} note\n{sequence}\n" for name, sequence in prompts.items()))
    return path


def generate(folder, family="striped_hyena2", prompts=PROMPTS, **options):
    options = {"model": loaded(family), "length": 12} | options
    return genoembed.generate(write(folder, prompts), **options)


def sequences(report):
    return {row.id: row.sequence for row in report.rows}


def by_hand(family, prompt, number, *, length, seed=0, temperature=1.0, top_k=None, top_p=1.0, end=True):
    """Read everything again for each token, one row, and draw by loops; sequence and its log-likelihood."""
    tokenizer = loaded(family).tokenizer
    words = letter_tokens(tokenizer)
    end_id = tokenizer.eos_token_id
    drawable = sorted([*words, *([end_id] if end else [])])
    ids = [start_id(family), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    numbers, made, total = uniforms(seed, prompt.encode(), number), "", 0.0
    while len(made) < length:
        with torch.inference_mode():
            logits = plain(family)(torch.tensor([ids])).logits[0, -1].double()
        kept = drawable_probabilities(logits[drawable].tolist(), temperature, top_k, top_p)
        token = drawable[inverse_cumulative(kept, next(numbers))]
        if token == end_id:
            return made, total, "eod"
        made += words[token]
        total += float(logits.log_softmax(-1)[token])
        ids.append(token)
    return made, total, "length"


@pytest.mark.parametrize("family", CAUSAL)
def test_step_from_a_state_scores_as_the_whole_row_does(family):
    model = LanguageModel(loaded(family))
    assert model.state_argument == ("cache_params" if family == "mamba" else "past_key_values")
    words = sorted(letter_tokens(loaded(family).tokenizer))
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor(words)[torch.randint(len(words), (3, 48), generator=generator)]
    stepwise = model.start(ids[:, :5], block_tokens=512)
    for position in range(5, ids.shape[1]):
        with torch.inference_mode():
            whole = plain(family)(ids[:, :position]).logits[:, -1].float()
        difference = (stepwise.logits_BV.log_softmax(-1) - whole.log_softmax(-1)).abs().max()
        assert difference < 1e-5
        stepwise.append(ids[:, position])
        if position == 20:  # rows go, and one comes twice
            stepwise.select([2, 0, 0])
            ids = ids[[2, 0, 0]]


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.0}, {"temperature": 0.6, "top_k": 3}, {"top_p": 0.7, "seed": 5},
    {"stop_at_end": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", CAUSAL)
def test_sequences_are_those_of_a_plain_loop(tmp_path, family, options):
    report = generate(tmp_path, family, num_samples=2, **options)
    assert [row.id for row in report.rows] == [f"{name}_{number}" for name in PROMPTS for number in (1, 2)]
    plain_options = {name: value for name, value in options.items() if name != "stop_at_end"}
    end = options.get("stop_at_end", True)
    for row in report.rows:
        made, total, ended = by_hand(
            family, PROMPTS[row.prompt], row.sample, length=12, end=end, **plain_options
        )
        assert (row.sequence, row.ended) == (made, ended)
        if made:
            assert row.log_likelihood == pytest.approx(total, abs=1e-4)
            assert row.mean_log_likelihood == pytest.approx(total / len(made), abs=1e-5)
    assert report.num_bases == sum(len(row.sequence) for row in report.rows) == report.stats.bases
    assert report.cached
    assert report.stats.bases_under_way == 0


@pytest.mark.parametrize("family", CAUSAL)
def test_number_batch_order_and_state_change_nothing(tmp_path, family):
    expected = sequences(generate(tmp_path, family, num_samples=4))
    assert len(set(expected.values())) > len(PROMPTS)
    for options in (
        {"batch_rows": 1},
        {"batch_rows": 3},
        {"batch_tokens": 1},
        {"cache": False},
        {"cache": False, "batch_tokens": 1},
    ):
        assert sequences(generate(tmp_path, family, num_samples=4, **options)) == expected, options
    fewer = sequences(generate(tmp_path, family, num_samples=2))
    assert fewer == {name: expected[name] for name in fewer}
    alone = sequences(generate(tmp_path, family, {"c": PROMPTS["c"], "renamed": PROMPTS["a"]}))
    assert alone == {"c_1": expected["c_1"], "renamed_1": expected["a_1"]}


def test_another_seed_gives_other_sequences(tmp_path):
    assert sequences(generate(tmp_path, length=30)) != sequences(generate(tmp_path, length=30, seed=1))


def test_log_likelihood_is_that_of_score(tmp_path):
    report = generate(tmp_path, length=20, temperature=1.5)
    joined = {
        name: PROMPTS[row.prompt] + row.sequence for name, row in zip(PROMPTS, report.rows, strict=True)
    }
    genoembed.score(
        write(tmp_path, joined), model=loaded("striped_hyena2"), output=tmp_path / "s.tsv",
        per_base=tmp_path / "bases.tsv",
    )  # fmt: skip
    lines = [line.split("\t") for line in (tmp_path / "bases.tsv").read_text().splitlines()[1:]]
    for row in report.rows:
        values = [
            float(line[4])
            for line in lines
            if line[0] == row.prompt and int(line[1]) >= len(PROMPTS[row.prompt])
        ]
        assert len(values) == len(row.sequence)
        assert row.log_likelihood == pytest.approx(math.fsum(values), abs=1e-4)


class Noisy:
    """A model whose rows come out differently in a batch, by a little more than those of real ones."""

    def __init__(self, monkeypatch, size):
        read = Continuation._read

        def noisy(continuation, ids_BL):
            logits = read(continuation, ids_BL)
            if len(logits) == 1 and continuation._state_argument is None:
                return logits
            seed = int(ids_BL.sum()) * 100 + len(logits)
            noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
            return logits + size * noise.clamp(-1, 1)

        monkeypatch.setattr(Continuation, "_read", noisy)


def test_rounding_that_differs_with_the_batch_never_decides(tmp_path, monkeypatch):
    Noisy(monkeypatch, 2e-5)
    model = LanguageModel(loaded("llama"))
    records = list(genoembed.read_sequences(write(tmp_path)))
    found, rescored = [], 0
    for batch_rows in (3, 7, 64):
        options = GeneratorOptions(
            length=40,
            num_samples=12,
            batch_rows=batch_rows,
            stop_at_end=False,
            sampling=SamplingOptions(top_p=0.9),
        )
        generator = SequenceGenerator(model, options)
        found.append([[sample.sequence for sample in samples] for samples in generator.generate(records)])
        rescored += generator.num_rescored
    assert found[0] == found[1] == found[2]
    assert 0 < rescored < 0.005 * 3 * 48 * 40


def test_rounding_would_decide_without_the_row_alone(tmp_path, monkeypatch):
    Noisy(monkeypatch, 5e-2)
    model = LanguageModel(loaded("llama"))
    records = list(genoembed.read_sequences(write(tmp_path)))
    found = []
    for batch_rows in (4, 64):
        generator = SequenceGenerator(
            model, GeneratorOptions(length=40, num_samples=12, batch_rows=batch_rows, stop_at_end=False)
        )
        generator._tolerance = 0.0
        found.append([[sample.sequence for sample in samples] for samples in generator.generate(records)])
    assert found[0] != found[1]


class EndsAfter:
    """A head that ends a document once a row has so many tokens."""

    def __init__(self, monkeypatch, family, tokens):
        read, end = Continuation._read, loaded(family).tokenizer.eos_token_id

        def ending(continuation, ids_BL):
            logits = read(continuation, ids_BL).clone()
            logits[:, end] = 100 if continuation._ids_BL.shape[1] >= tokens else -100
            return logits

        monkeypatch.setattr(Continuation, "_read", ending)


@pytest.mark.parametrize("family", ["striped_hyena2", "llama"])
def test_end_of_a_document_ends_a_sequence(tmp_path, monkeypatch, family):
    whole = sequences(generate(tmp_path, family, num_samples=3, stop_at_end=False))
    EndsAfter(monkeypatch, family, 15)
    report = generate(tmp_path, family, num_samples=3)
    # prompts of 7, 9 and 14 bases after a start token
    lengths = {row.id: (len(row.sequence), row.ended) for row in report.rows}
    assert [lengths[f"{name}_1"] for name in PROMPTS] == [(5, "eod"), (5, "eod"), (0, "eod"), (7, "eod")]
    assert report.ended == {"eod": 12}
    assert sequences(generate(tmp_path, family, num_samples=3, stop_at_end=False)) == whole


def test_rows_that_end_leave_the_others_as_they_are(tmp_path):
    """Of the tiny llama, every tenth token ends a document: batches thin out as they go."""
    report = generate(tmp_path, "llama", num_samples=20, length=30)
    ends = {len(row.sequence) for row in report.rows}
    assert len(ends) > 10
    for row in report.rows[::7]:
        assert row.sequence == by_hand("llama", PROMPTS[row.prompt], row.sample, length=30)[0]


def test_sequence_that_ends_at_once_is_a_header_alone(tmp_path, monkeypatch):
    EndsAfter(monkeypatch, "llama", 1)
    report = generate(tmp_path, "llama", {"a": "ACGT"}, output=tmp_path / "o.fa")
    text = (tmp_path / "o.fa").read_text()
    assert text.count("\n") == 1
    assert " bases=0 ended=eod log_likelihood=NA mean_log_likelihood=NA\n" in text
    assert report.num_bases == 0
    assert math.isnan(report.mean_log_likelihood)


def test_only_tokens_of_the_four_bases_are_drawn(tmp_path):
    assert letter_tokens(loaded("llama").tokenizer) == {5: "A", 6: "C", 7: "G", 8: "T"}
    report = generate(tmp_path, "gpt_neox", num_samples=4, length=30, temperature=3.0, stop_at_end=False)
    words = set(letter_tokens(loaded("gpt_neox").tokenizer).values())
    assert len(words) > 8
    for row in report.rows:
        assert set(row.sequence) <= set("ACGT")
        assert 30 <= len(row.sequence) < 30 + max(map(len, words))


def test_header_says_how_a_sequence_was_made(tmp_path):
    out = tmp_path / "out.fa"
    report = generate(
        tmp_path, num_samples=2, length=44, temperature=0.5, top_k=3, top_p=0.9, seed=7, output=out,
        stop_at_end=False, tag="|S__A B%|", prompts={"x": "ACGTA"},
    )  # fmt: skip
    assert report.rows == ()
    header, sequence = out.read_text().splitlines()[:2]
    name, *fields = header.removeprefix(">").split(" ")
    facts = dict(field.split("=", 1) for field in fields)
    assert name == "x_1"
    assert facts == {
        "generated_by": f"genoembed-{genoembed.__version__}",
        "model": str(folder_of("striped_hyena2")),
        "weights": loaded("striped_hyena2").provenance["weights_sha256"][:12],
        "dtype": "float32",
        "start_token": "0",
        "length": "44",
        "temperature": "0.5",
        "top_k": "3",
        "top_p": "0.9",
        "seed": "7",
        "tag": "|S__A%20B%25|",
        "stop_at_end": "no",
        "prompt": "x",
        "prompt_bases": "1-5",
        "sample": "1",
        "bases": str(len(sequence)),
        "ended": "length",
        "log_likelihood": facts["log_likelihood"],
        "mean_log_likelihood": facts["mean_log_likelihood"],
    }
    assert float(facts["mean_log_likelihood"]) == pytest.approx(
        float(facts["log_likelihood"]) / len(sequence), abs=1e-4
    )


def test_tag_is_read_before_the_prompt(tmp_path):
    tag = "|D__BACTERIA|"
    with_tag = generate(tmp_path, prompts={"x": "ACGTA"}, tag=tag, start_token="none")
    ids = torch.tensor([[*tag.encode(), *b"ACGTA"]])
    with torch.inference_mode():
        logits = plain("striped_hyena2")(ids).logits[0, -1].double()
    drawable = sorted([*b"ACGT", 0])
    first = drawable[
        inverse_cumulative(
            drawable_probabilities(logits[drawable].tolist(), 1.0, None, 1.0), next(uniforms(0, b"ACGTA", 1))
        )
    ]
    assert (with_tag.rows[0].sequence[:1] or "\0") == chr(first)
    assert with_tag.start_token == "none"
    with pytest.raises(ModelError, match=r"tag is 'tag!', which the tokenizer of .* cannot read"):
        generate(tmp_path, "llama", tag="tag!")


def test_prompt_comes_with_the_sequence_where_asked(tmp_path):
    out = tmp_path / "out.fa"
    generate(tmp_path, output=out)
    plain_text = list(genoembed.read_sequences(out))
    generate(tmp_path, output=out, overwrite=True, with_prompt=True)
    for record, alone in zip(genoembed.read_sequences(out), plain_text, strict=True):
        prompt = PROMPTS[record.id.rpartition("_")[0]]
        assert record.sequence.decode() == prompt + alone.sequence.decode()


@pytest.mark.parametrize("family", ["striped_hyena2", "llama"])
def test_last_bases_of_a_prompt_that_is_too_long_are_read(tmp_path, family, caplog):
    long = random_dna(90, 8)  # of a context of 64
    report = generate(tmp_path, family, {"long": long, "short": long[-10:]}, length=12)
    row = report.rows[0]
    assert (row.prompt_start, row.prompt_end, report.windowed) == (90 - 52, 90, 1)
    assert "of 1 prompts, only the last bases were read: with 12 bases to come" in caplog.text
    model = LanguageModel(loaded(family))
    ids = torch.tensor([loaded(family).tokenizer(long[-52:], add_special_tokens=False)["input_ids"]])
    logits = model.next_logits(ids, block_tokens=512)[0].double()
    words = letter_tokens(loaded(family).tokenizer)
    drawable = sorted([*words, loaded(family).tokenizer.eos_token_id])
    kept = drawable_probabilities(logits[drawable].tolist(), 1.0, None, 1.0)
    token = drawable[inverse_cumulative(kept, next(uniforms(0, long.encode(), 1)))]
    assert row.sequence[:1] == words.get(token, "")


def test_length_that_leaves_no_room_is_refused(tmp_path):
    with pytest.raises(
        ModelError, match=r"length is 63, but the context of .* holds 64 tokens.* to 62 or less"
    ):
        generate(tmp_path, "llama", length=63)
    assert len(generate(tmp_path, "llama", {"a": "ACG"}, length=62, stop_at_end=False).rows[0].sequence) == 62


def test_masked_and_finetuned_models_are_refused(tmp_path, monkeypatch):
    from tests.by_hand import build_family

    with pytest.raises(ModelError, match="its tokens see what follows them"):
        genoembed.generate(write(tmp_path), model=build_family("bert", tmp_path / "bert"), device="cpu")
    monkeypatch.setattr(
        "genoembed.models.language_model.find_facts", lambda model: SimpleNamespace(values={})
    )
    with pytest.raises(ModelError, match="was fine-tuned for vectors or labels"):
        generate(tmp_path)


def test_wrong_options_come_in_one_message(tmp_path):
    with pytest.raises(ConfigError) as caught:
        generate(tmp_path, length=0, top_p=0, temperature=-1, seed=-1, dtype="float32")
    text = str(caught.value)
    for part in (
        "length is 0",
        "top_p is 0",
        "temperature is -1",
        "seed is -1",
        "dtype: the model is loaded",
    ):
        assert part in text


def test_unknown_values_fail_by_name_or_are_skipped(tmp_path, monkeypatch):
    read = Continuation._read
    bad = torch.tensor(loaded("llama").tokenizer("GGGGG", add_special_tokens=False)["input_ids"])

    def spoil(continuation, ids_BL):
        logits = read(continuation, ids_BL).clone()
        for row, ids in enumerate(continuation._ids_BL):
            if bool((ids.unfold(0, 5, 1) == bad).all(1).any()):
                logits[row] = math.nan
        return logits

    monkeypatch.setattr(Continuation, "_read", spoil)
    prompts = {"fine": "ACGTACTTT", "bad": "ACGGGGGTT"}
    with pytest.raises(NonFiniteError, match="record 'bad'"):
        generate(tmp_path, "llama", prompts, length=2)
    out = tmp_path / "out.fa"
    report = generate(tmp_path, "llama", prompts, length=2, on_error="skip", output=out, num_samples=2)
    assert report.failed == {"bad": "not finite"}
    headers = [line for line in out.read_text().splitlines() if line.startswith(">")]
    assert [line.split()[0] for line in headers] == [">fine_1", ">fine_2", ">bad"]
    assert headers[2].endswith("prompt=bad failed=not%20finite")


def test_short_memory_halves_the_rows_and_changes_nothing(tmp_path, monkeypatch, caplog):
    expected = sequences(generate(tmp_path, "llama", num_samples=8))
    read = Continuation._read

    def short(continuation, ids_BL):
        if len(ids_BL) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(continuation, ids_BL)

    monkeypatch.setattr(Continuation, "_read", short)
    report = generate(tmp_path, "llama", num_samples=8)
    assert sequences(report) == expected
    assert report.stats.halvings > 0
    assert "no memory for 16 sequences at a time" in caplog.text
    monkeypatch.setattr(Continuation, "_read", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ModelError, match="no memory left for a sequence"):
        generate(tmp_path, "llama")
    failed = generate(tmp_path, "llama", on_error="skip").failed
    assert failed == dict.fromkeys(PROMPTS, "no memory")


def test_words_of_a_k_mer_model_end_where_the_prompt_does(tmp_path, caplog):
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import build_six_mers

    folder = build_six_mers("llama", tmp_path / "six")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    model = genoembed.load_model(str(folder), device="cpu", dtype="float32")
    prompt = random_dna(20, 1)
    report = generate(
        tmp_path, prompts={"x": prompt}, model=model, length=13, temperature=0.5, num_samples=3, top_k=64
    )
    assert (report.rows[0].prompt_start, report.out_of_frame) == (2, 1)
    assert "of 1 prompts, the first bases were not read" in caplog.text
    inner = generate(tmp_path, prompts={"x": prompt[2:]}, model=model, length=13, num_samples=1)
    assert inner.out_of_frame == 0
    for row in report.rows:
        assert row.ended == "eod" or 13 <= len(row.sequence) < 19
    failed = generate(tmp_path, prompts={"y": "ACGT", "x": prompt}, model=model, on_error="skip").failed
    assert failed == {"y": "too short"}


def test_state_that_does_not_agree_is_not_used(monkeypatch, caplog):
    model = LanguageModel(loaded("llama"))
    read = Continuation._last_logits

    def wrong(continuation, ids_BL):
        logits = read(continuation, ids_BL)
        return logits + 0.1 * logits.sin() if continuation._state_argument else logits

    monkeypatch.setattr(Continuation, "_last_logits", wrong)
    assert model.state_argument is None
    assert "its state gives other probabilities than the whole sequence" in caplog.text


def test_state_that_fails_is_not_used(monkeypatch):
    model = LanguageModel(loaded("llama"))
    monkeypatch.setattr(
        Continuation, "select", lambda *_: (_ for _ in ()).throw(AttributeError("no such cache"))
    )
    assert model.state_argument is None


def test_bundled_model_goes_on_from_a_prompt(tmp_path):
    report = genoembed.generate(
        write(tmp_path, {"x": "ACGTTTGACA" * 3}), length=8, num_samples=2, device="cpu", temperature=0.0
    )
    assert report.rows[0].sequence == report.rows[1].sequence
    assert len(report.rows[0].sequence) == 8


@pytest.mark.parametrize(("family", "cached"), [("evo1", True), ("generator", True), ("hyenadna", False)])
def test_published_families_generate_what_they_score(tmp_path, family, cached):
    folder = Path(__file__).parents[1] / "golden" / "families" / family
    model = genoembed.load_model(str(folder), device="cpu", dtype="float32")
    prompts = {"x": random_dna(36, 1), "y": random_dna(24, 2)}
    options = {"model": model, "length": 30, "num_samples": 2, "stop_at_end": False}
    report = generate(tmp_path, prompts=prompts, **options)
    assert report.cached is cached
    assert sequences(generate(tmp_path, prompts=prompts, **options, cache=False)) == sequences(report)
    joined = {row.id: prompts[row.prompt] + row.sequence for row in report.rows}
    whole, before = (
        {row.id: row for row in genoembed.score(write(tmp_path, texts), model=model).rows}
        for texts in (joined, prompts)
    )
    for row in report.rows:
        expected = whole[row.id].log_likelihood - before[row.prompt].log_likelihood
        assert row.log_likelihood == pytest.approx(expected, abs=2e-4)


def test_words_that_overlap_are_refused(tmp_path):
    words = ["".join(letters) for letters in itertools.product("ACGT", repeat=2)]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words)))
    model = LanguageModel(loaded("llama"))
    model.model = genoembed.GenomicModel(
        loaded("llama").module, KmerTokenizer(str(vocabulary)), name="overlapping"
    )
    with pytest.raises(ModelError, match="'overlapping': its tokens are overlapping k-mers"):
        SequenceGenerator(model, GeneratorOptions())


def test_prompt_of_letters_that_the_vocabulary_lacks_is_counted_or_refused(tmp_path):
    report = generate(tmp_path, "llama", {"x": "ACGTRACGT"}, length=4)
    assert (report.stats.unread, report.num_sequences) == (1, 1)
    prompts = {"r": "ACRRYYRR", "x": "ACGT"}
    with pytest.raises(UnreadError, match=r"'r': 6 of 8 bases cannot be read .* its vocabulary has no R, Y"):
        generate(tmp_path, "llama", prompts)
    assert generate(tmp_path, "llama", prompts, on_error="skip").failed == {"r": "unread"}
