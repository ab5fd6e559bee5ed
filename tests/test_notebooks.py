"""The notebooks, executed from top to bottom; what they show is checked, not only that they run."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"

# A last cell, seen by this test only: the tour's own variables as JSON.
REPORT = """
import json, sys
print("REPORT" + json.dumps({
    "python": sys.executable,
    "added": [added, added_after_shuffle],
    "hits": blended.trace.hits,
    "spans": shuffled.spans,
    "tokens": len(wider),
    "new_tokens": sum(end - start for start, end, kind in first.trace.hits if kind == "miss"),
    "kinds": [[kind for _, _, kind in result.trace.hits] for result in (first, again)],
    "compute_of_news": [result.trace.compute_fraction for result in (first, again)],
    "methods": METHODS,
    "compute": {method: row["compute"] for method, row in one.items()},
    "deviation": [float(layer[~layer.isnan()].mean()) for layer in deviation],
    "rows": rows_per_layer,
    "reused_tokens": int((~deviation[0].isnan()).sum()),
    "question_tokens": len(shuffled) - shuffled.spans[-1][1],
    "kl": {method: row["kl"] for method, row in results.items()},
    "summary": {method: point["compute"] for method, point in summary.items()},
}))
"""


SERVING_REPORT = """
import json
print("REPORT" + json.dumps({
    "answers": [first_time[0], again[0], plain[0]],
    "seconds": [again[1], plain[1]],
    "report": again[2],
    "passage_tokens": sum(len(encode(p)) for p in passages),
    "metrics": metrics,
}))
"""


CODECS_REPORT = """
import json
print("REPORT" + json.dumps({
    "sizes": [len(raw), len(data)],
    "explained": float(explained),
    "zeros": float((symbols == 0).mean()),
    "error": float(error / spread),
    "rows": [[row["data"], row["codec"]["id"], row["bits_per_element"], row["kl"]] for row in rows],
}))
"""


def source(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / name, as_version=4)


def executed(name: str, report: str) -> SimpleNamespace:
    """What the report's variables are after the whole notebook, and how many pictures it drew."""
    notebook = source(name)
    notebook.cells.append(nbformat.v4.new_code_cell(report))
    NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    printed = "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stdout")
    pictures = sum("image/png" in out.get("data", {}) for out in outputs)
    return SimpleNamespace(**json.loads(printed.partition("REPORT")[2]), pictures=pictures)


@pytest.fixture(scope="module")
def tour() -> SimpleNamespace:
    return executed("tour.ipynb", REPORT)


@pytest.fixture(scope="module")
def codec_tour() -> SimpleNamespace:
    return executed("codecs.ipynb", CODECS_REPORT)


@pytest.mark.parametrize("name", ["tour.ipynb", "codecs.ipynb", "serving.ipynb"])
def test_it_is_committed_without_outputs(name):
    code = [cell for cell in source(name).cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.parametrize(
    ("name", "marker"), [("tour.ipynb", "policies.register("), ("codecs.ipynb", "@register_codec(")]
)
def test_a_policy_and_a_codec_are_written_in_under_30_lines(name, marker):
    (cell,) = [c.source for c in source(name).cells if marker in c.source]
    assert len(cell.partition("\n\n\nmine")[0].splitlines()) < 30


def test_it_ran_in_this_environment_and_drew(tour):
    assert Path(tour.python) == Path(sys.executable)
    assert tour.pictures == 3


def test_reordered_passages_are_all_hits(tour):
    assert tour.added == [len(tour.spans), 0]
    assert [hit[:2] for hit in tour.hits] == tour.spans
    assert [kind for _, _, kind in tour.hits] == ["exact"] + ["reused"] * (len(tour.spans) - 1)


def test_a_new_passage_costs_only_itself_and_only_once(tour):
    first, again = tour.kinds
    assert [i for i, kind in enumerate(first) if kind == "miss"] == [4]
    assert "miss" not in again
    once, twice = tour.compute_of_news
    assert once - twice == pytest.approx(tour.new_tokens / tour.tokens, rel=0.2)


def test_true_compute_is_what_the_ratio_and_the_selection_cost(tour):
    compute = tour.compute
    assert list(compute) == tour.methods
    assert compute["full_recompute"] == pytest.approx(1.0)
    assert compute["full_reuse"] < 0.05 < compute["epic"] < 0.2 < compute["prefix_cache"] < 1.0
    assert compute["epic"] == pytest.approx(compute["random"], rel=0.05)
    for method in ("cacheblend", "query_attention", "attention_value_norm"):
        assert compute["epic"] < compute[method] < 1.4 * compute["epic"]


def test_the_trace_shows_where_the_error_is_and_who_computed_what(tour):
    assert tour.deviation[0] < 1e-5, "layer 0 knows no context, so that moving a chunk leaves only rounding"
    assert min(tour.deviation[2:]) > 0.05
    kept = round(0.15 * tour.reused_tokens) + tour.question_tokens
    assert set(tour.rows["epic"]) == set(tour.rows["query_attention"]) == {kept}
    every = tour.reused_tokens + tour.question_tokens
    assert tour.rows["cacheblend"] == [every] + [kept] * (len(tour.deviation) - 1)


def test_the_new_policy_stands_beside_the_built_in_ones(tour):
    assert "strong_heads" in tour.kl
    assert len({len(values) for values in tour.kl.values()}) == 1
    mean = {method: sum(values) / len(values) for method, values in tour.kl.items()}
    assert mean["full_recompute"] == 0.0
    assert mean["strong_heads"] < 0.5 * mean["random"] < mean["full_reuse"]
    assert tour.summary["strong_heads"] == pytest.approx(tour.summary["query_attention"], rel=0.02)
    assert tour.summary["strong_heads"] < 0.2


def test_the_codec_notebook_shows_small_chunks_and_the_ranking(codec_tour):
    raw, coded = codec_tour.sizes
    assert raw > 8 * coded
    assert 0.05 < codec_tour.explained < 1
    assert codec_tour.zeros > 0.5
    assert codec_tour.error < 0.2
    assert codec_tour.pictures == 2
    for text in ("people", "asyncio"):
        rows = [r[1:] for r in codec_tour.rows if r[0] == text]
        best = max((bits for name, bits, kl in rows if name == "fisher_klt" and kl < 0.02), default=99)
        rivals = [bits for name, bits, kl in rows if name != "fisher_klt" and kl < 0.02]
        assert best < 0.6 * min(rivals), "every rival of like quality takes far more bits"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test says why")
def test_serving_blends_what_it_stored():
    found = executed("serving.ipynb", SERVING_REPORT)
    assert all(found.answers)
    assert found.report["segment"] >= 0.9 * found.passage_tokens
    assert 0 < found.report["recomputed"] < 0.3 * found.passage_tokens
    hits = [line for line in found.metrics if line.startswith("lmcache_blend:hit_tokens_total{")]
    assert any('kind="segment"' in line and not line.endswith(" 0.0") for line in hits)
