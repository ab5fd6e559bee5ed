"""1,500 of the damaged and hostile inputs of `fuzz_parsers.py`; run that for more."""

import fuzz_parsers


def test_no_parser_fails_in_a_way_that_is_not_meant():
    found = fuzz_parsers.fuzz(1500, seed=0)
    problems = [f"seed {f['seed']}, {f['parser']}: {f['problem']}" for f in found if f["problem"]]
    assert not problems, "\n".join(problems[:20])
    assert {f["parser"] for f in found} == set(fuzz_parsers.parsers())
    assert {f["outcome"] for f in found} == {"refused", "served"}
