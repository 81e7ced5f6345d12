"""What a request may hold, and what is said about one that is wrong."""

from __future__ import annotations

import json

import pytest

from tests.serving.conftest import WIDTH, serving

WRONG = [
    (b"", "the body is not valid JSON", None),
    (b"{", "the body is not valid JSON", None),
    (b'{"input": "ACGT"', "the body is not valid JSON", None),
    (b"\xff\xfe", "the body is not valid JSON", None),
    (b"[" * 90_000, "nested too deeply", None),
    (b'{"input": ' + b"9" * 5000 + b"}", "the body is not valid JSON", None),
    (b'["ACGT"]', "the body is a list, expected a JSON object", None),
    (b"null", "the body is null, expected a JSON object", None),
    ({}, "input is missing", "input"),
    ({"input": None}, "input is missing", "input"),
    ({"input": []}, "input is an empty list", "input"),
    ({"input": ""}, "input is empty; give its bases", "input"),
    ({"input": " \n"}, "input is empty; give its bases", "input"),
    ({"input": ["ACGT", ""]}, "input[1] is empty; give its bases", "input"),
    ({"input": 5}, "input is 5, expected a sequence", "input"),
    ({"input": True}, "input is true, expected a sequence", "input"),
    ({"input": {"a": 1}}, "input is an object, expected a sequence", "input"),
    ({"input": [65, 67]}, "input[0] is 65: token ids are not taken", "input"),
    ({"input": [[65, 67]]}, "input[0] is a list: token ids are not taken", "input"),
    ({"input": ["ACGT", None]}, "input[1] is null, expected a sequence as a string", "input"),
    ({"input": ["ACGT", True]}, "input[1] is true, expected a sequence as a string", "input"),
    ({"input": ["ACGT", "ACGJ"]}, "input[1]: 'J' at position 4 is not in alphabet", "input"),
    ({"input": ["ACGT", "AC-GT"]}, "input[1]: gap '-' at position 3", "input"),
    ({"input": ["AC\u00e9T"]}, "input[0]: '\u00e9' at position 3 is no letter", "input"),
    ({"input": "AC\u202eT"}, "input: U+202E at position 3 is no letter", "input"),
    (b'{"input": "AC\\ud800"}', "input: U+D800 at position 3 is no letter", "input"),
    ({"input": "AC\x00T"}, "input: control byte 0x00 at position 3", "input"),
    ({"input": ">a\nACGT"}, "input: '>' inside a line of sequence (position 1)", "input"),
    ({"input": "MKVLAAGWWLKEFILQ"}, "the letters are those of a protein", "input"),
    ({"input": "A" * 501}, "input has 501 bases, but a sequence may have 500", "input"),
    ({"input": ["A"] * 21}, "input holds 21 sequences, but a request may hold 20", "input"),
    (
        {"input": "ACGT", "encoding_format": "hex"},
        'encoding_format is "hex"; set it to float',
        "encoding_format",
    ),
    ({"input": "ACGT", "encoding_format": ["float"]}, "encoding_format is a list", "encoding_format"),
    ({"input": "ACGT", "dimensions": 64}, "dimensions is 64, but the vectors", "dimensions"),
    ({"input": "ACGT", "dimensions": str(WIDTH)}, f'dimensions is "{WIDTH}"', "dimensions"),
    ({"input": "ACGT", "dimensions": True}, "dimensions is true", "dimensions"),
    ({"input": "ACGT", "user": 5}, "user is 5", "user"),
    ({"input": "ACGT", "model": 5}, "model is 5, expected a string", "model"),
    ({"input": "ACGT", "layer": 3}, 'unknown key "layer"; expected input, model', "layer"),
    ({"input": "ACGT", "truncate\x1b": 3}, "unknown key", "truncate\x1b"),
]


@pytest.mark.parametrize(("body", "message", "param"), WRONG, ids=[message for _, message, _ in WRONG])
def test_wrong_request_is_refused_with_what_is_wrong(body, message, param, served):
    error = served.refused(body)
    assert message in error["message"]
    assert error["param"] == param
    assert "\x1b" not in error["message"]
    assert "skip" not in error["message"]


def test_remedy_of_a_letter_is_one_that_the_client_has_or_the_server(served):
    error = served.refused({"input": "ACJT"})
    assert error["message"].endswith("; start the server with --invalid mask or fix it")
    assert error["code"] == "invalid_letter"


def test_other_model_is_not_found(served):
    error = served.refused({"input": "ACGT", "model": "text-embedding-3-small"}, 404)
    assert error["code"] == "model_not_found"
    assert error["message"].endswith("set model to 'genoembed-mini' or leave it out")


def test_null_is_not_given(served):
    keys = {"model": None, "encoding_format": None, "dimensions": None, "user": None}
    assert len(served.embed("ACGT", **keys)["data"]) == 1


def test_masked_letters_and_stripped_gaps_are_taken_where_the_server_says_so():
    with serving(invalid="mask", gaps="strip") as served:
        found = [
            item["embedding"] for item in served.embed(["ACGTJACGT", "ACGTNACGT", "AC-GT", "ACGT"])["data"]
        ]
    assert found[0] == found[1]
    assert found[2] == found[3]


def test_paths_and_methods_that_are_not_there_are_said_in_the_same_form(served):
    for method, path, expected in (
        ("GET", "/", 404),
        ("GET", "/v1/embeddings", 405),
        ("POST", "/healthz", 405),
    ):
        status, headers, body = served.ask(method, path)
        assert status == expected
        assert "GET /v1/models" in json.loads(body)["error"]["message"]
        assert (headers.get("allow") is not None) == (status == 405)


def test_only_json_is_taken(served):
    for kind in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        status, _, body = served.ask("POST", "/v1/embeddings", '{"input": "ACGT"}', kind)
        assert status == 415
        assert "Content-Type" in json.loads(body)["error"]["message"]
    kind = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert served.ask("POST", "/v1/embeddings", '{"input": "ACGT"}', kind)[0] == 200


def test_models_are_listed_and_described(served):
    _, _, body = served.ask("GET", "/v1/models")
    (model,) = json.loads(body)["data"]
    assert (model["id"], model["object"], model["dimensions"]) == ("genoembed-mini", "model", WIDTH)
    assert model["layers"] == ["blocks.2.mlp.l3"]
    assert json.loads(served.ask("GET", "/v1/models/genoembed-mini")[2]) == model
    assert served.ask("GET", "/v1/models/other%2Fname")[0] == 404
