"""2,000 of the damaged and hostile chunks of `fuzz_codecs.py`; run that for more."""

import fuzz_codecs


def test_no_damage_is_decoded_and_no_writer_harms():
    found = fuzz_codecs.fuzz(2000, seed=0)
    problems = [f"seed {f['seed']}, {f['codec']}, {f['mutation']}: {f['problem']}" for f in found if f["problem"]]
    assert not problems, "\n".join(problems[:20])
    assert {f["codec"] for f in found} == set(fuzz_codecs.CASES)
    assert {f["outcome"] for f in found} == {"corrupt", "decoded", "same"}
