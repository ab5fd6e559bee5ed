"""The Blender: partial hits, exactness, batches, decoding, segments, policies, traces, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from architectures import VOCAB, build

from lmcache_blend import BlendConfig, Blender, MemoryStore, Prompt, RowPolicy
from lmcache_blend.blend import Plan, by_separator, policies
from lmcache_blend.codecs import get_codec
from lmcache_blend.errors import ConfigError, ContextLengthError, SegmentError, UnknownNameError
from lmcache_blend.hf import HFRunner
from lmcache_blend.hf.dense import KVPool

LENGTHS = (20, 31, 14, 25)
METHODS = ("full_recompute", "prefix_cache", "full_reuse", "random", "epic", "cacheblend", "query_attention",
           "attention_value_norm", "oracle")  # fmt: skip


def ids(n, seed):
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PARTS = [ids(n, i) for i, n in enumerate(LENGTHS)]
PREFIX, QUESTION = ids(8, 90), ids(7, 91)


def full(runner, prompt):
    with torch.inference_mode():
        return runner.model(input_ids=prompt.tokens[None]).logits[0, -1]


def close(a, b):
    return (a - b).abs().max() <= 1e-4


def test_registered_methods():
    assert set(METHODS) <= set(policies)


def test_a_new_passage_in_the_middle_costs_only_itself(tiny):
    blender = Blender(tiny, BlendConfig(policy="full_reuse", store_misses=False))
    blender.store(Prompt.join([PARTS[0], PARTS[1], PARTS[3]], QUESTION))
    prompt = Prompt.join(PARTS, QUESTION)
    trace = blender.prefill(prompt).trace
    assert [kind for *_, kind in trace.hits] == ["exact", "reused", "miss", "reused"]
    start = LENGTHS[0] + LENGTHS[1]
    want = [*range(start, start + LENGTHS[2]), *range(sum(LENGTHS), len(prompt))]
    assert all(rows.tolist() == want for rows in trace.rows)
    assert trace.compute_fraction < (LENGTHS[2] + len(QUESTION)) / len(prompt) + 0.1


def test_misses_are_stored_and_hit_next_time(tiny):
    blender = Blender(tiny, BlendConfig(policy="full_reuse"))
    prompt = Prompt.join(PARTS, QUESTION)
    first = blender.prefill(prompt)
    assert close(first.logits, full(tiny, prompt))
    second = blender.prefill(prompt)
    # Nothing approximate stood before any of them, so the same prompt is one long prefix hit.
    assert [kind for *_, kind in second.trace.hits] == ["exact"] * 4
    assert second.trace.rows[0].tolist() == list(range(sum(LENGTHS), len(prompt)))
    assert close(second.logits, first.logits)
    moved = blender.prefill(Prompt.join([PARTS[2], PARTS[0]], QUESTION))
    assert [kind for *_, kind in moved.trace.hits] == ["reused", "reused"]


def test_a_miss_behind_reused_text_is_never_taken_for_exact(tiny):
    blender = Blender(tiny, BlendConfig(policy="full_reuse"))
    blender.store(Prompt.join([PARTS[0], PARTS[1]], QUESTION))
    prompt = Prompt.join([PARTS[1], PARTS[0], PARTS[2]], QUESTION)
    assert [kind for *_, kind in blender.prefill(prompt).trace.hits] == ["exact", "reused", "miss"]
    assert [kind for *_, kind in blender.prefill(prompt).trace.hits] == ["exact", "reused", "reused"]


def test_prefix_cache_is_exact_and_stops_at_the_first_moved_chunk(tiny):
    blender = Blender(tiny, BlendConfig(policy="prefix_cache", store_misses=False))
    prompt = Prompt.join(PARTS, QUESTION, PREFIX)
    blender.store(prompt)
    result = blender.prefill(prompt)
    assert [kind for *_, kind in result.trace.hits] == ["exact"] + ["miss"] * 4
    assert close(result.logits, full(tiny, prompt))


@pytest.mark.parametrize("encode", ["alone", "bos", "prefix"])
def test_encode_modes(tiny, encode):
    blender = Blender(tiny, BlendConfig(policy="full_reuse", encode=encode))
    prompt = Prompt.join(PARTS, QUESTION, PREFIX)
    assert blender.store(prompt) == 5
    kinds = [kind for *_, kind in blender.prefill(prompt).trace.hits]
    # Behind the prefix, the first passage is where it was computed; "alone" and "bos" it never is.
    assert kinds == ["exact", "exact" if encode == "prefix" else "reused", "reused", "reused", "reused"]
    other = Blender(tiny, BlendConfig(encode="alone"), store=blender.chunks)
    assert other.store(prompt) == (0 if encode == "alone" else 4), "chunks of another encoding are not mixed up"


def test_a_stale_chunk_is_no_prefix_to_encode_behind(tiny):
    """The prefix's text was first met in the middle of another prompt: its KV there is not the prefix's own."""
    blender = Blender(tiny, BlendConfig(policy="full_reuse", encode="prefix"))
    blender.prefill(Prompt.join([PARTS[0], PREFIX], QUESTION))
    prompt = Prompt.join([PARTS[1]], QUESTION, PREFIX)
    blender.store(prompt)
    clean = Blender(tiny, BlendConfig(policy="full_reuse", encode="prefix"))
    clean.store(prompt)
    got, want = (b.chunks.get(b._key(prompt, 1)).chunk for b in (blender, clean))
    for a, b in zip(got.layers, want.layers, strict=True):
        assert close(a[0], b[0])
        assert close(a[1], b[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama-default", "gemma2-default", "deepseek_v3-default"])
def test_every_policy(name, method):
    runner = HFRunner.checked(build(name))
    blender = Blender(runner, BlendConfig(policy=method, recompute_ratio=0.25, store_misses=False))
    prompt = Prompt.join(PARTS, QUESTION)
    blender.store(prompt)
    trace = blender.prefill(prompt).trace
    candidates = sum(LENGTHS[1:])
    assert trace.method == method
    assert len(trace.rows) == runner.num_layers
    assert all(set(b.tolist()) <= set(a.tolist()) for a, b in zip(trace.rows, trace.rows[1:], strict=False))
    if policies.get(method).fixed_ratio is None:
        assert trace.recompute_ratio == 0.25
        assert len(trace.rows[-1]) == round(0.25 * candidates) + len(QUESTION)
        assert trace.scores.isfinite().sum() == candidates
        compared = trace.deviation[-1].isfinite()
        assert set(compared.nonzero().flatten().tolist()) == set(trace.rows[-1].tolist()) - set(
            range(sum(LENGTHS), len(prompt))
        )
    else:
        assert trace.recompute_ratio is None
    reused_all = len(trace.rows[0]) == len(QUESTION)
    assert (0 < trace.compute_fraction < 0.2) if reused_all else trace.compute_fraction > 0.2
    assert set(trace.stages_ms) == {"load", "place", "probe", "select", "forward"}
    assert sum(trace.stages_ms.values()) <= trace.ttft_ms


def test_full_recompute_counts_as_one(tiny):
    prompt = Prompt.join(PARTS, QUESTION)
    trace = Blender(tiny, BlendConfig(policy="full_recompute")).prefill(prompt).trace
    assert trace.compute_fraction == pytest.approx(1.0)
    assert trace.recomputed_fraction == 1.0


def test_compute_is_what_the_flop_counter_of_torch_counts(tiny):
    from torch.utils.flop_counter import FlopCounterMode

    n = 64
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        tiny.model.set_attn_implementation("eager")
        tiny.model(input_ids=torch.tensor(ids(n, 5))[None], logits_to_keep=1)
    tiny.model.set_attn_implementation("sdpa")
    # torch counts the masked half of the scores, which is never computed by a blocked attention.
    masked = sum(tiny.cost.attend) * (n * n - n * (n + 1) / 2)
    assert tiny.cost.full(n) + masked == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_hkvd_counts_the_first_layer_and_the_check(tiny):
    blender = Blender(tiny, BlendConfig(recompute_ratio=0.2, store_misses=False))
    prompt = Prompt.join(PARTS, QUESTION)
    blender.store(prompt)
    hkvd, epic = (blender.prefill(prompt, policy=p).trace for p in ("cacheblend", "epic"))
    open_rows = len(prompt) - LENGTHS[0]
    assert [len(r) for r in hkvd.rows] == [open_rows] + [len(hkvd.rows[1])] * 3
    extra = tiny.cost.row[0] * (open_rows - len(epic.rows[0])) + tiny.cost.check[1] * open_rows
    assert hkvd.flops - epic.flops > extra
    assert hkvd.deviation[1].isfinite().sum() == open_rows - len(QUESTION), "the check compares every reused token"


def test_gradual_schedule_keeps_the_ratio_on_average():
    runner = HFRunner.checked(build("llama-default"))
    gradual = policies.get("cacheblend")(check="gradual")
    assert gradual.schedule(4, 0.2) == {1: 0.2}
    shares = gradual.schedule(32, 0.2)
    assert sorted(shares) == [1, 8, 16, 24]
    assert sum(shares.values()) / 4 == pytest.approx(0.2)
    del runner


def test_gradual_drops_rows_several_times():
    class Twice(type(policies.get("cacheblend")())):
        def schedule(self, layers, ratio):
            return {1: 1.5 * ratio, 2: ratio, 3: 0.5 * ratio}

    runner = HFRunner.checked(build("llama-default"))
    blender = Blender(runner, BlendConfig(store_misses=False))
    prompt = Prompt.join(PARTS, QUESTION)
    blender.store(prompt)
    rows = blender.prefill(prompt, policy=Twice(), recompute_ratio=0.2).trace.rows
    assert [len(r) - len(QUESTION) for r in rows[1:]] == [21, 14, 7]


@pytest.mark.parametrize("method", ["epic", "cacheblend", "attention_value_norm", "full_recompute"])
@pytest.mark.parametrize("name", ["llama-default", "gemma3-two-thetas", "deepseek_v3-default"])
def test_batches_equal_single_prompts(name, method):
    runner = HFRunner.checked(build(name))
    blender = Blender(runner, BlendConfig(policy=method, recompute_ratio=0.3, store_misses=False))
    prompts = [
        Prompt.join(PARTS, QUESTION),
        Prompt.join([PARTS[2], PARTS[1]], ids(4, 7)),
        Prompt.join([PARTS[3], PARTS[0]], QUESTION),
    ]
    for prompt in prompts:
        blender.store(prompt)
    single = [blender.prefill(p) for p in prompts]
    batch = blender.prefill_batch(prompts)
    for one, other in zip(single, batch, strict=True):
        assert close(one.logits, other.logits)
        assert [a.tolist() for a in one.trace.rows] == [b.tolist() for b in other.trace.rows]
        assert one.trace.compute_fraction == pytest.approx(other.trace.compute_fraction)
    together = blender.generate_batch(batch, 6, stop_ids=())
    assert together == [one.generate(6, stop_ids=()) for one in single]


def test_decoding_equals_the_models_own(tiny):
    prompt = Prompt.join(PARTS, QUESTION)
    blender = Blender(tiny, BlendConfig(policy="epic", recompute_ratio=1.0))
    blender.store(prompt)
    result = blender.prefill(prompt)
    with torch.inference_mode():
        own = tiny.model.generate(
            prompt.tokens[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    want = own[0, len(prompt) :].tolist()
    assert result.generate(12, stop_ids=()) == want
    assert result.generate(12, stop_ids=()) == want, "decoding leaves the prefill as it was"
    assert result.generate(12, stop_ids=(want[4],)) == want[: want.index(want[4])]
    logits = result.continuation_logits(torch.tensor(want))
    assert logits.argmax(-1).tolist() == want


def test_decoding_past_the_first_buffer(tiny):
    """Buffers hold 256 tokens; a prompt of 250 that decodes 5 more keeps to the model's 256 positions."""
    prompt = Prompt(torch.tensor(ids(250, 1)), ((0, 100), (100, 200)))
    blender = Blender(tiny, BlendConfig(policy="full_recompute"))
    assert len(blender.prefill(prompt).generate(50, stop_ids=())) == 7


def test_buffers_grow_without_losing_anything(tiny):
    kv = tiny.new_kv(200)
    tokens = torch.tensor(ids(200, 2))
    tiny.forward([tokens], [kv], Plan([torch.arange(200)]))
    before = kv.read(2, torch.arange(200))
    kv.extend(300)
    assert kv.capacity >= 300
    assert all(torch.equal(a, b) for a, b in zip(before, kv.read(2, torch.arange(200)), strict=True))


def test_results_do_not_share_buffers(tiny):
    """A prefill that is still held keeps its KV, whatever runs after it."""
    blender = Blender(tiny, BlendConfig(policy="full_reuse"))
    a, b = Prompt.join(PARTS[:2], QUESTION), Prompt.join(PARTS[2:], QUESTION)
    first = blender.prefill(a)
    want = first.generate(8, stop_ids=())
    for _ in range(3):
        blender.prefill(b)
    assert first.generate(8, stop_ids=()) == want


def test_the_buffers_used_last_are_kept():
    pool = KVPool(((1, 2, 1, 2),), torch.float32, torch.device("cpu"), keep=2)
    for tokens in (256, 512, 768):
        pool.give(*pool.take(tokens))
    assert [capacity for capacity, _ in pool._free] == [512, 768]
    assert pool.take(700)[0] == 768
    assert [capacity for capacity, _ in pool._free] == [512]


def test_salts_separate_tenants(tiny):
    store, prompt = MemoryStore(), Prompt.join(PARTS, QUESTION)
    Blender(tiny, BlendConfig(salt="a"), store).store(prompt)
    trace = Blender(tiny, BlendConfig(salt="b", policy="full_reuse"), store).prefill(prompt).trace
    assert {kind for *_, kind in trace.hits} == {"miss"}


def test_a_store_that_encodes(tiny):
    store, prompt = MemoryStore(get_codec("raw")), Prompt.join(PARTS, QUESTION)
    plain, coded = (Blender(tiny, BlendConfig(policy="epic", store_misses=False), s) for s in (None, store))
    for blender in (plain, coded):
        blender.store(prompt)
    a, b = plain.prefill(prompt), coded.prefill(prompt)
    assert torch.equal(a.logits, b.logits)
    assert b.trace.loaded_bytes == store.nbytes > a.trace.loaded_bytes
    # A chunk that went bad in the store is a miss: computed again, never served.
    key = next(iter(store.list())).key
    value = bytes(store.top.memory.view(key))
    store.top.tier.put([key], [[value[:-40], bytes(40)]])
    again = coded.prefill(prompt)
    assert [kind for *_, kind in again.trace.hits].count("miss") == 1


def test_a_foreign_chunk_is_a_miss(tiny):
    """A store that answers with another chunk's KV, or another model's, costs a recompute, not a wrong answer."""
    blender, prompt = Blender(tiny, BlendConfig(policy="full_reuse", store_misses=False)), Prompt.join(PARTS, QUESTION)
    blender.store(prompt)
    store = blender.chunks
    keys = [blender._key(prompt, i) for i in range(4)]
    a, b, c = store.retrieve(keys[1:])
    store.top.tier.delete(keys[1:])
    store.store(keys[1:], [b, a, replace(c, layers=c.layers[:-1])])
    result = blender.prefill(prompt)
    assert [kind for *_, kind in result.trace.hits] == ["exact", "miss", "miss", "miss"]
    assert close(result.logits, full(tiny, prompt))


def test_a_small_store_evicts_the_least_recently_used(tiny):
    store = MemoryStore(max_bytes=3 * 31 * 4 * 4 * 2 * 16 * 2)
    blender = Blender(tiny, store=store)
    for part in PARTS:
        blender.store(Prompt.join([part], QUESTION))
    assert store.nbytes <= store.max_bytes
    assert 0 < len(store) <= 4


def test_segments_by_separator():
    sep = [7, 8]
    tokens = [1, 2, 3, *sep, 4, 5, *sep, 6]
    prompt = by_separator(tokens, sep)
    assert prompt.spans == ((0, 5), (5, 9))
    assert by_separator([1, 2], sep).spans == ()
    assert by_separator([9, 9, 9, 9, 1], [9, 9]).spans == ((0, 2), (2, 4))
    with pytest.raises(SegmentError):
        by_separator(tokens, [])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (((0, 5), (4, 8)), "overlaps"),
        (((5, 5),), "empty"),
        (((0, 99),), "outside"),
        (((6, 9), (0, 3)), "overlaps"),
        (((-2, 3),), "overlaps"),
    ],
)
def test_bad_spans(spans, message):
    with pytest.raises(SegmentError, match=message):
        Prompt(torch.arange(10), spans)


def test_bad_input(tiny):
    blender = Blender(tiny)
    prompt = Prompt.join(PARTS, QUESTION)
    with pytest.raises(UnknownNameError, match="did you mean 'cacheblend'"):
        blender.prefill(prompt, policy="cachblend")
    with pytest.raises(ConfigError, match=r"1\.5.*\[0, 1\]"):
        blender.prefill(prompt, recompute_ratio=1.5)
    with pytest.raises(ConfigError, match=r"'chekc'.*'check'"):
        Blender(tiny, BlendConfig(policy="cacheblend", options={"chekc": "single"}))
    with pytest.raises(ContextLengthError, match=r"300 tokens.*256 positions"):
        blender.prefill(Prompt(torch.arange(300) % 100))
    with pytest.raises(ConfigError, match="tokenizer"):
        blender.prefill(["text"], "question")


def test_a_policy_of_ones_own(tiny):
    class LastTokens(RowPolicy):
        def score(self, signals):
            return signals.chunk_offset - signals.chunk_length.float()

    blender = Blender(tiny, BlendConfig(store_misses=False))
    prompt = Prompt.join(PARTS, QUESTION)
    blender.store(prompt)
    trace = blender.prefill(prompt, policy=LastTokens(), recompute_ratio=3 / sum(LENGTHS[1:])).trace
    ends = [sum(LENGTHS[: i + 1]) - 1 for i in range(4)]
    assert trace.rows[0].tolist() == [*ends[1:], *range(sum(LENGTHS), len(prompt))]


def test_prompt_that_ends_in_a_span(tiny):
    """Without a question the last token is computed all the same: its logits give the first token."""
    blender = Blender(tiny, BlendConfig(policy="full_reuse"))
    prompt = Prompt.join(PARTS, [])
    blender.store(prompt)
    result = blender.prefill(prompt)
    assert result.trace.rows[0].tolist() == [len(prompt) - 1]
    for policy in ("query_attention", "cacheblend"):
        assert (
            blender.prefill(prompt, policy=policy, recompute_ratio=1.0).logits.sub(full(tiny, prompt)).abs().max()
            <= 1e-4
        )


def test_text_api(smollm2):
    blender = Blender(smollm2, BlendConfig(policy="attention_value_norm", recompute_ratio=0.3))
    passages = ["Ada Brandt was born in Lisbon and works as a baker.", "Bo Ruiz was born in Oslo and repairs clocks."]
    prefix = "Answer the question from the passages.\n\n"
    first = blender.prefill(passages, "Question: Where was Bo Ruiz born?\nAnswer: Bo Ruiz was born in", prefix)
    again = blender.prefill(passages[::-1], "Question: Where was Bo Ruiz born?\nAnswer: Bo Ruiz was born in", prefix)
    assert {kind for *_, kind in first.trace.hits} == {"miss"}
    assert "miss" not in {kind for *_, kind in again.trace.hits}
    one_string = " # # ".join([*passages, "Question: Who repairs clocks?"])
    hits = blender.prefill(one_string, "\nAnswer:", prefix).trace.hits
    assert hits == [(a, b, "exact") for a, b, _ in first.trace.hits]
    exact = Blender(smollm2, BlendConfig(policy="epic", recompute_ratio=1.0), blender.chunks)
    full = Blender(smollm2, BlendConfig(policy="full_recompute"))
    question = "Question: Where was Bo Ruiz born?\nAnswer: Bo Ruiz was born in"
    assert (
        exact.generate(passages[::-1], question, 8, prefix) == full.generate(passages[::-1], question, 8, prefix) != ""
    )
