"""Serving without vLLM: settings, content matching, what a request may ask for, ranks that choose the same rows."""

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file

from lmcache_blend.blend.policies import CacheBlend
from lmcache_blend.blend.select import Deviation, Work, base_signals, deviation_chooser
from lmcache_blend.errors import ConfigError, LMCacheBlendError
from lmcache_blend.serving import ServingConfig
from lmcache_blend.serving.coming import Coming, joined
from lmcache_blend.serving.identity import _sample
from lmcache_blend.serving.matching import CUT_MAX, WINDOW, SegmentIndex, cuts, rolling, with_gaps
from lmcache_blend.serving.plugin import check_version
from lmcache_blend.serving.scheduler import BlendRequest
from lmcache_blend.types import Prompt, Trace


# ---------------------------------------------------------------------- settings
def test_lmcache_names_mean_the_same():
    config = ServingConfig.read(
        {"chunk_size": 128, "local_cpu": True, "max_local_cpu_size": 2, "local_disk": "file:///kv",
         "max_local_disk_size": 3,
         "remote_url": "redis://h:6379", "save_decode_cache": True, "save_unfull_chunk": False, "enable_blending": True,
         "blend_recompute_ratios": [0.2], "blend_special_str": " ## "}
    )  # fmt: skip
    assert config.chunk_tokens == 128
    assert config.save_decode_cache
    assert not config.partial_chunks
    assert [t.tier for t in config.tiers] == ["cpu", "disk", "redis://h:6379"]
    assert config.tiers[0].options == {"capacity_bytes": 2 << 30}
    assert config.tiers[1].options == {"path": "/kv", "capacity_bytes": 3 << 30}
    assert config.blend is not None
    assert (config.blend.recompute_ratio, config.blend.separator) == (0.2, " ## ")


def test_file_and_extra_config(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text("chunk_size: 64\nblend: {policy: epic}\n")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(path))
    assert ServingConfig.read().chunk_tokens == 64
    monkeypatch.delenv("LMCACHE_CONFIG_FILE")
    config = ServingConfig.read({"config_file": str(path), "chunk_tokens": 32})
    assert config.blend is not None
    assert config.blend.policy == "epic"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"chunk_sise": 1}, "chunk_size"),
        ({"blend": {"polcy": "epic"}}, "policy"),
        ({"blend": {"recompute_ratio": 1.5}}, "recompute_ratio"),
        ({"tiers": ["cpu"], "local_disk": "/x"}, "tiers"),
        ({"local_cpu": False}, "nothing can be stored"),
        ({"config_file": "/nowhere.yaml"}, "/nowhere.yaml"),
    ],
)
def test_wrong_settings_are_one_clear_error(settings, named):
    with pytest.raises(ConfigError, match=named):
        ServingConfig.read(settings)


def test_which_configs_keep_bits(tmp_path):
    disk = {"tier": "disk", "path": str(tmp_path)}
    assert ServingConfig(tiers=("cpu", disk), codec="lossless").exact
    assert not ServingConfig(tiers=("cpu", disk), codec="int8").exact
    assert not ServingConfig(tiers=({"tier": "cpu", "capacity_bytes": 1 << 20, "codec": "fp8"},)).exact


def test_scheduler_of_several_workers_needs_a_tier_that_it_sees(tmp_path):
    with pytest.raises(ConfigError, match="cpu tier"):
        ServingConfig(tiers=("cpu",)).engine(without_memory=True)
    both = ServingConfig(tiers=("cpu", {"tier": "disk", "path": str(tmp_path)}))
    assert [t.tier for t in both.engine(without_memory=True).tiers] == ["disk"]


@pytest.mark.parametrize("version", ["0.31.4", "0.34.0", "1.0", "dev"])
def test_other_vllm_versions_are_refused(version):
    with pytest.raises(ConfigError, match=version):
        check_version(version)


@pytest.mark.parametrize(
    "ask", [{"spans": [[5, 2]]}, {"spans": [[0, 99]]}, {"spans": "all"}, {"policy": "nope"}, {"recompute_ratio": 2},
            {"policy": "oracle"}, {"ratio": 1}, 3]
)  # fmt: skip
def test_wrong_requests_are_refused(ask):
    with pytest.raises(LMCacheBlendError):
        BlendRequest.read(ask, ServingConfig(blend={}), 20)


def test_request_over_settings():
    config = ServingConfig(blend={"policy": "cacheblend", "options": {"signal": "k"}})
    plain = BlendRequest.read(None, config, 20)
    assert plain is not None
    assert (plain.policy, plain.options, plain.enabled) == ("cacheblend", {"signal": "k"}, True)
    own = BlendRequest.read({"policy": "epic", "spans": [[0, 5], [5, 9]]}, config, 20)
    assert own is not None
    assert (own.policy, own.options, own.spans) == ("epic", {}, [(0, 5), (5, 9)])
    with pytest.raises(ConfigError, match="does not blend"):
        BlendRequest.read({"spans": []}, ServingConfig(), 20)


# ---------------------------------------------------------------------- content matching
def random_text(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50000, n)


def test_rolling_hash_depends_on_the_window_alone():
    a = random_text(1, 200)
    whole = rolling(a, WINDOW)
    assert len(whole) == 200 - WINDOW + 1
    assert all(rolling(a[i : i + WINDOW], WINDOW)[0] == whole[i] for i in range(len(whole)))
    assert len(set(whole.tolist())) == len(whole)


def test_segments_are_found_at_any_offset_and_verified():
    a, b = random_text(1, 90), random_text(2, 120)
    index = SegmentIndex()
    index.add(a)
    index.add(b)
    stored = {a.tobytes(), b.tobytes()}
    for shift in range(7):
        prompt = np.concatenate((random_text(9, shift), b, random_text(8, 11), a, random_text(7, 5)))
        found = index.match(prompt, 0, lambda s, p=prompt: p[s[0] : s[1]].tobytes() in stored)
        assert found == [(shift, shift + 120), (shift + 131, shift + 221)]
    changed = a.copy()
    changed[-1] += 1  # the first window still matches: the full key must not
    assert index.match(changed, 0, lambda s: changed[s[0] : s[1]].tobytes() in stored) == []
    assert index.match(a, 0, lambda s: False) == []


def test_the_longest_stored_segment_wins_and_none_overlap():
    a = random_text(1, 200)
    index = SegmentIndex()
    for n in (50, 120, 200):
        index.add(a[:n])
    assert index.match(a, 0, lambda s: s[1] - s[0] != 200) == [(0, 120)]


def test_the_index_survives_and_is_shared(tmp_path: Path):
    a, b = random_text(1, 60), random_text(2, 60)
    one, two = SegmentIndex(tmp_path / "i"), SegmentIndex(tmp_path / "i")
    one.add(a)
    one.add(a)
    assert two.match(a, 0, lambda s: True) == [(0, 60)]
    two.add(b)
    with (tmp_path / "i").open("ab") as file:
        file.write(b"torn")
    three = SegmentIndex(tmp_path / "i")
    assert len(three) == 2
    assert one.match(b, 0, lambda s: True) == [(0, 60)]


def test_new_text_is_cut_at_the_same_places_wherever_it_stands():
    a = random_text(1, 3000)
    first = cuts(a, 0, len(a), 32)
    assert len(first) > 5
    assert all(32 <= end - start <= CUT_MAX for start, end in first)
    moved = np.concatenate((random_text(2, 313), a))
    second = cuts(moved, 0, len(moved), 32)
    same = {(s, e) for s, e in first} & {(s - 313, e - 313) for s, e in second}
    assert len(same) >= len(first) - 3


def test_gaps_are_cut_around_matches():
    a = random_text(1, 2000)
    spans = with_gaps(a, 0, [(700, 900)], 32)
    assert (700, 900) in spans
    assert all(x[1] <= y[0] for x, y in pairwise(spans))


# ---------------------------------------------------------------------- who a model is
def test_another_version_of_any_tensor_is_another_model(tmp_path):
    tensors = {f"layers.{i}": torch.randn(64, 300, generator=torch.Generator().manual_seed(i)) for i in range(40)}
    save_file(tensors, tmp_path / "a.safetensors")
    (tmp_path / "moved").mkdir()
    save_file(tensors, tmp_path / "moved" / "a.safetensors")
    one = _sample(tmp_path / "a.safetensors")
    assert one == _sample(tmp_path / "moved" / "a.safetensors")
    for name in tensors:
        save_file({**tensors, name: tensors[name] * 1.001}, tmp_path / "b.safetensors")
        assert _sample(tmp_path / "b.safetensors") != one
    for data in (b"", b"\xff" * 9, b"\x02\0\0\0\0\0\0\0{}", bytes(100_000)):
        (tmp_path / "c.bin").write_bytes(data)
        assert len(_sample(tmp_path / "c.bin")) == 32


# ---------------------------------------------------------------------- tensor parallel
class HeadsKV:
    """KV of some heads: k, v [H, T, D]."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor):
        self.pair = k, v

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair


def chosen(heads: slice, reduce) -> list[int]:
    """Rows that HKVD keeps, from the deviation of these heads."""
    generator = torch.Generator().manual_seed(5)
    old, new = (torch.randn(2, 4, 40, 8, generator=generator) for _ in range(2))
    new[:, 0, 3:9] *= 5.0  # head 0 and head 3 disagree about which tokens deviate
    new[:, 3, 20:26] *= 4.0
    prompt = Prompt(torch.arange(40), ((0, 36),))
    candidate = torch.zeros(40, dtype=torch.bool)
    candidate[:36] = True
    kv = HeadsKV(old[0, heads], old[1, heads])
    work = Work(prompt, kv, Trace("", 0.2, 40), candidate, ~candidate, torch.arange(40),  # pyright: ignore
                base_signals(prompt, candidate), Deviation(2, candidate))  # fmt: skip
    choose = deviation_chooser(CacheBlend(), [work], 0.2, 0.0, reduce)
    return choose(1, torch.arange(40)[None], new[0, heads][None], new[1, heads][None])[0].tolist()


def _rank(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)

    def total(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    got = chosen(slice(2 * rank, 2 * rank + 2), total)
    Path(f"{path}.{rank}").write_text(str(got))
    dist.destroy_process_group()


def test_two_ranks_choose_the_rows_that_one_would(tmp_path):
    path = str(tmp_path / "rendezvous")
    mp.spawn(_rank, (path,), nprocs=2)  # pyright: ignore
    whole = chosen(slice(0, 4), None)
    assert [Path(f"{path}.{r}").read_text() for r in (0, 1)] == [str(whole)] * 2
    assert chosen(slice(0, 2), None) != chosen(slice(2, 4), None)  # without the sum they would part ways


def test_pieces_that_lie_one_behind_the_other_are_one():
    rows = torch.randn(9, 2 * 4).unflatten(1, (2, 4)).transpose(0, 1)  # [H, T, D] as a codec decodes them
    k = [rows[:, :2], rows[:, 2:5], rows[:, 5:]]
    apart = [*k[:2], k[2].clone()]
    for pieces, starts in ((k, [0]), (apart, [0, 5]), (k[::-1], [0, 4, 7])):
        found = joined([(x, x) for x in pieces])
        assert [at for at, *_ in found] == starts
        for slot in (1, 2):
            assert torch.equal(torch.cat([piece[slot] for piece in found], 1), torch.cat(pieces, 1))


def test_each_layer_is_placed_by_one_thread_and_none_after_the_end():
    coming = Coming(None, None, [], 0, set(range(200)), None, [])
    placed, go = [], threading.Barrier(5)

    def reader():
        go.wait()
        for layer in range(200):
            with coming.claimed(layer) as mine:
                if mine:
                    placed.append(layer)

    threads = [threading.Thread(target=reader) for _ in range(4)]
    for thread in threads:
        thread.start()
    go.wait()
    for thread in threads:
        thread.join()
    assert sorted(placed) == list(range(200))

    coming, inside, leave = Coming(None, None, [], 0, {0, 1}, None, []), threading.Event(), threading.Event()

    def slow():
        with coming.claimed(0):
            inside.set()
            leave.wait(10)
            placed.append("late")

    thread = threading.Thread(target=slow)
    thread.start()
    inside.wait()
    threading.Timer(0.1, leave.set).start()
    coming.close()
    assert placed[-1] == "late", "closing waits for who is placing"
    with coming.claimed(1) as mine:
        assert not mine
    thread.join()
