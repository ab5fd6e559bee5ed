"""`codec inspect`: the facts of a chunk add up, are told without decoding, and never harm."""

import json
from dataclasses import replace

import pytest
import torch
from test_codec_conformance import CASES, FITTED, MEAN, SINKS, UNIFORM, pipeline

from lmcache_blend import cli
from lmcache_blend.codecs import get_codec, rans
from lmcache_blend.codecs.container import Container, pack
from lmcache_blend.codecs.inspect import describe, render
from lmcache_blend.errors import CorruptChunkError
from lmcache_blend.testing import CodecConformance

SUITE = CodecConformance()
SHAPES = ((2, 8, 2, 8),) * 2 + ((1, 16, 0, 0),)
RANS = pipeline(SINKS, MEAN, UNIFORM, {"id": "rans"})


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.fitted])
def test_the_parts_of_every_codec_add_up(name):
    chunk = SUITE.chunk(SHAPES, 37, torch.bfloat16)
    data = get_codec(CASES[name].config()).encode(chunk)
    d = json.loads(json.dumps(describe(data)))
    assert (d["tokens"], d["elements"], d["bytes"]) == (37, 37 * (32 + 32 + 16), len(data))
    assert d["shapes"] == [[2, [2, 8, 2, 8]], [1, [1, 16, 0, 0]]]
    assert d["dtypes"] == [[3, ["bfloat16", "bfloat16"]]]
    assert d["bits_per_element"] == 8 * len(data) / d["elements"]
    assert d["exact_after"] == bytes(range(32)).hex()
    rest = d["header_bytes"] + d["token_id_bytes"]
    if "segments" not in d:
        assert rest + chunk.nbytes == len(data)
        return
    assert rest + d["padding_bytes"] + sum(s["bytes"] for s in d["segments"]) == len(data)
    assert [s["layers"] for s in d["segments"]] == [[0, 0], [1, 1], [2, 2]]
    for segment in d["segments"]:
        assert segment["bytes"] == sum(4 + p["bytes"] for p in segment["planes"])
        for plane in segment["planes"]:
            assert not plane["stages"] or plane["bytes"] == 1 + sum(4 + s["bytes"] for s in plane["stages"])
    assert "37" in render(d)
    assert len(render(d).splitlines()) < 25


def test_stages_tables_and_plain_planes_are_named(monkeypatch):
    chunk = SUITE.chunk(SHAPES, 37, torch.float32)
    chunk.layers[1][0][0, 0, 0] = float("nan")
    data = get_codec(RANS).encode(chunk)
    monkeypatch.setattr(rans, "decode", None)
    (k, v), (nan, _), (mla, empty) = (s["planes"] for s in describe(data)["segments"])
    assert [s["id"] for s in k["stages"]] == ["sinks", "mean", "uniform", "rans"]
    assert [s["bytes"] for s in k["stages"]][:3] == [2 * 16 * 4, 2 * 16, 4]
    coder = v["stages"][3]
    assert (coder["rows"], coder["length"]) == (16, 33)
    assert sum(n for _, n in coder["tables"]) == 16
    assert (nan["kind"], nan["stages"], nan["bits_per_element"]) == ("plain", [], 8 * (1 + 4 * 16 * 37) / (16 * 37))
    assert (mla["kind"], empty["kind"], empty["bits_per_element"]) == ("coded", "plain", None)
    assert "sinks 128, mean 32, uniform 4, rans" in render(describe(data))


def test_tables_of_the_rows_own_and_of_smallest():
    chunk = SUITE.chunk(SHAPES[:2], 37, torch.float32)
    own = describe(get_codec(CASES["pipeline_rans_row"].spec).encode(chunk))
    assert {p["stages"][1]["tables"] for s in own["segments"] for p in s["planes"]} == {"own"}
    shared = describe(get_codec("cachegen").encode(chunk))
    assert {sum(n for _, n in p["stages"][1]["tables"]) for s in shared["segments"] for p in s["planes"]} == {16}


def test_a_codec_that_is_not_known_here_has_nameless_stages():
    mine = get_codec(RANS)
    data = mine.encode(SUITE.chunk(SHAPES, 5, torch.float32))
    other = data.replace(b'"pipeline"', b'"elsewher"')
    with pytest.raises(CorruptChunkError):
        describe(other)
    container = Container(data)
    header = replace(container.header, codec={"id": "elsewhere", "note": "[bold]\x1b"})
    data = pack(header, container.tokens(), [bytes(container.segment(1 + i)) for i in range(3)])
    plane = describe(data)["segments"][0]["planes"][0]
    assert [s["id"] for s in plane["stages"]] == [None] * 4
    assert plane["stages"][3]["rows"] == 16
    text = render(describe(data))
    assert "? 128" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("bad", [b"", b"LMCB", b"LMCBRAW1", b"x" * 99])
def test_bytes_that_are_no_chunk_are_corrupt(bad):
    with pytest.raises(CorruptChunkError):
        describe(bad)


def test_a_codec_with_a_profile_names_its_stages_only_with_it():
    codec = get_codec(CASES["kvtc_fitted"].config())
    data = codec.encode(SUITE.chunk(FITTED, 37, torch.float32))
    without, with_it = (describe(data, c)["segments"][0] for c in (None, codec))
    assert without["layers"] == with_it["layers"] == [0, 1]
    assert [s["id"] for s in without["planes"][0]["stages"]] == [None] * 3
    assert [s["id"] for s in with_it["planes"][0]["stages"]] == ["sinks", "recent", "components"]
    assert describe(data)["profile"] == codec.profile_digest


def test_the_command_names_stages_where_it_is_given_the_profile(tmp_path, capsys):
    config = CASES["kvtc_fitted"].config()
    file = tmp_path / "chunk"
    file.write_bytes(get_codec(config).encode(SUITE.chunk(FITTED, 37, torch.float32)))
    assert cli.main(["codec", "inspect", str(file), "--profile", config["profile"]]) == 0
    assert "components" in capsys.readouterr().out
    assert cli.main(["codec", "inspect", str(file), "--profile", str(tmp_path / "none")]) == 2
    assert "make one with `lmcache-blend codec fit`" in capsys.readouterr().err
