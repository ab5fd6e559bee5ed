"""Reports: who is ranked, who wins at equal true compute, and what is written."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lmcache_blend.errors import ConfigError
from lmcache_blend.eval.boards import Board, make_boards
from lmcache_blend.eval.export import as_csv, as_json
from lmcache_blend.eval.plots import method_colours, pareto_front
from lmcache_blend.eval.render import markdown, print_boards
from lmcache_blend.eval.report import report
from lmcache_blend.eval.results import RunConfig, SampleResult
from lmcache_blend.eval.writer import RunFolder, read_folder

PNG = b"\x89PNG\r\n\x1a\n"
RATIOLESS = ("full_recompute", "prefix_cache", "full_reuse")
LAYERS, TOKENS = 4, 60


def combination(
    output: Path,
    method: str,
    ratio: float | None = 0.15,
    *,
    loss: float,
    compute: float,
    n: int = 12,
    gain: float = 1.0,
    answers: bool = True,
    **changes,
) -> Path:
    """One folder of results: `loss` nats of NLL and KL above full prefill, `gain` nats of context."""
    fields = {"task": "squad", "model": "m", "fingerprint": "ab", "max_new_tokens": 8, **changes}
    folder = RunFolder(
        output, RunConfig(method=method, recompute_ratio=None if method in RATIOLESS else ratio, **fields)
    )
    rng = np.random.default_rng(3)
    for i in range(n):
        base, noise = rng.uniform(1, 2), rng.uniform(0.8, 1.2)
        folder.append(
            SampleResult(
                id=str(i),
                prompt_sha256="0" * 16,
                tokens=TOKENS,
                answers=["x"] if answers else [],
                prediction="x",
                prediction_full="x",
                nll=base + loss * noise if answers else None,
                nll_full=base if answers else None,
                nll_no_context=base + gain * noise + (0.1 if i % 2 else -0.1) if answers else None,
                kl=loss * noise,
                top1_agreement=1 - loss / 2,
                flip=False,
                f1=1.0 if answers else None,
                em=1.0 if answers else None,
                rouge_l=1.0 if answers else None,
                contains=1.0 if answers else None,
                f1_full=1.0 if answers else None,
                ttft_ms=1000 * compute * noise,
                ttft_full_ms=1000 * noise,
                rows=[TOKENS] * LAYERS,
                compute_fraction=compute,
                recomputed_fraction=compute,
                loaded_bytes=10,
                loaded_kv_bytes=10,
                raw_kv_bytes=10,
                stages_ms={"load": 1.0, "forward": 990 * compute * noise},
            )
        )
    deviation = rng.uniform(1e-3, 1, (LAYERS, TOKENS)).astype(np.float16)
    deviation[:, 50:] = np.nan
    rows = np.zeros((LAYERS, TOKENS), dtype=bool)
    rows[:, 50:] = rows[:, ::7] = True
    folder.write_trace(
        {
            "deviation": deviation,
            "deviation_exact": deviation,
            "rows": rows,
            "spans": np.array([[0, 20], [20, 50]]),
            "scores": np.zeros(0, np.float32),
        }
    )
    return folder.path


def boards_of(folders: list[Path]) -> list[Board]:
    return make_boards([(f, r) for f in folders if (r := read_folder(f)) is not None])


@pytest.fixture
def output(tmp_path: Path) -> Path:
    combination(tmp_path, "full_recompute", loss=0.0, compute=1.0)
    combination(tmp_path, "prefix_cache", loss=0.0, compute=0.95)
    combination(tmp_path, "full_reuse", loss=0.5, compute=0.02)
    for ratio, factor in ((0.05, 2.0), (0.15, 1.0)):
        combination(tmp_path, "epic", ratio, loss=0.2 * factor, compute=ratio)
        combination(tmp_path, "cacheblend", ratio, loss=0.15 * factor, compute=ratio + 0.035)
        combination(tmp_path, "attention_value_norm", ratio, loss=0.1 * factor, compute=ratio + 0.012)
        combination(tmp_path, "oracle", ratio, loss=0.01 * factor, compute=ratio + 1.0)
    combination(tmp_path, "query_attention", 0.5, loss=0.001, compute=0.5)
    return tmp_path


def test_ranking_leaves_out_exact_methods_and_bounds(output: Path):
    (board,) = boards_of(sorted(p.parent for p in output.rglob("config.json")))
    assert board.kind == "ranked"
    ranks = {row.name: row.rank for row in board.rows}
    assert ranks["query_attention 50 %"] == 1
    assert ranks["attention_value_norm 15 %"] == 2
    assert ranks["cacheblend 15 %"] == 3
    assert {row.note for row in board.rows if row.rank is None} == {"exact", "bound"}
    assert sorted(r for r in ranks.values() if r) == list(range(1, 9))


def test_the_winner_at_equal_true_compute_is_within_the_budget_of_cacheblend(output: Path):
    (board,) = boards_of(sorted(p.parent for p in output.rglob("config.json")))
    found = {(w.budget, w.by): w for w in board.winners}
    for by in ("quality", "kl"):
        assert found["cacheblend 15 %", by].name == "attention_value_norm 15 %"
        assert found["cacheblend 15 %", by].rival == "cacheblend 15 %"
        assert found["cacheblend 15 %", by].clear
        assert found["cacheblend 5 %", by].name == "attention_value_norm 5 %"
        # Without cacheblend at that ratio the costliest policy sets the budget.
        assert found["query_attention 50 %", by].name == "query_attention 50 %"
    assert found["cacheblend 15 %", "quality"].difference.mean == pytest.approx(0.05, abs=0.01)  # type: ignore[union-attr]


def test_fewer_samples_are_not_ranked_beside_more(tmp_path: Path):
    folders = [
        combination(tmp_path, "epic", loss=0.2, compute=0.15),
        combination(tmp_path, "random", loss=0.1, compute=0.15, n=5),
    ]
    (board,) = boards_of(folders)
    assert [(row.results.method, row.rank, row.note) for row in board.rows] == [
        ("epic", 1, ""),
        ("random", None, "n 5 of 12"),
    ]


def test_no_signal_and_fidelity_are_sections_of_their_own_and_never_ranked(tmp_path: Path):
    folders = [
        combination(tmp_path, "epic", loss=0.2, compute=0.15),
        combination(tmp_path, "epic", loss=0.2, compute=0.15, gain=0.0, task="guess"),
        combination(tmp_path, "random", loss=0.3, compute=0.15, gain=0.0, task="guess"),
        combination(tmp_path, "epic", loss=0.2, compute=0.15, answers=False, task="plain"),
    ]
    boards = boards_of(folders)
    assert [(b.title, b.kind) for b in boards] == [
        ("squad × m", "ranked"),
        ("plain × m", "fidelity"),
        ("guess × m", "no signal"),
    ]
    assert all(row.rank is None for b in boards[1:] for row in b.rows)
    assert not boards[1].winners
    assert not boards[2].winners
    text = markdown(boards)
    assert text.index("## Ranked") < text.index("## Fidelity only") < text.index("## No signal")
    assert "quality" not in text[text.index("### guess") :].splitlines()[4]


def test_what_cannot_be_compared_is_kept_apart(tmp_path: Path):
    folders = [
        combination(tmp_path, "epic", loss=0.2, compute=0.15),
        combination(tmp_path, "epic", loss=0.2, compute=0.15, seed=1),
        combination(tmp_path, "epic", loss=0.2, compute=0.15, encode="prefix"),
    ]
    boards = boards_of(folders)
    assert {b.title: len(b.rows) for b in boards} == {"squad × m (seed 0)": 2, "squad × m (seed 1)": 1}
    assert {row.label for b in boards for row in b.rows} == {"epic", "epic (encode=prefix)"}


def test_report_writes_tables_and_plots(output: Path):
    boards = report(output)
    text = (output / "leaderboard.md").read_text()
    assert "| 2 | attention_value_norm | 15 % |" in text
    assert "**" in text
    rows = list(csv.DictReader(io.StringIO((output / "leaderboard.csv").read_text())))
    assert len(rows) == 12
    assert {"quality", "quality_low", "kl", "ttft_ratio_high", "compute_fraction"} <= set(rows[0])
    pictures = sorted(p.name for p in (output / "plots").glob("*.png"))
    assert pictures == [
        "deviation__squad__m.png",
        "quality_vs_compute.png",
        "quality_vs_ttft.png",
        "stages__squad__m.png",
    ]
    assert all((output / "plots" / p).read_bytes().startswith(PNG) for p in pictures)
    json.dumps(as_json(boards), allow_nan=False)
    assert as_csv(boards).count("\n") == 13


def test_report_leaves_broken_folders_out(output: Path, capsys: pytest.CaptureFixture[str]):
    broken = next(output.glob("squad__m__epic__*"))
    (broken / "config.json").write_text("{")
    torn = next(output.glob("squad__m__oracle__*"))
    (torn / "trace.npz").write_bytes(b"PK\x03\x04 torn")
    (board,) = report(output)
    assert len(board.rows) == 11
    error = capsys.readouterr().err
    assert broken.name in error
    assert error.count("\n") == 1


def test_report_without_results(tmp_path: Path):
    with pytest.raises(ConfigError, match="no results"):
        report(tmp_path)


@pytest.mark.parametrize("width", [80, 160])
def test_terminal_tables_show_every_row(output: Path, width: int):
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    print_boards(boards_of(sorted(p.parent for p in output.rglob("config.json"))), console)
    text = out.getvalue()
    assert text.count("cacheblend") >= 2
    assert "…" not in text
    assert "Equal true compute" in text


def test_pareto_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.integers(0, 12, (40, 2))]
    front = pareto_front(points)
    for x, y in points:
        beaten = any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
        assert ((x, y) in front) == (not beaten)


def test_colours_are_the_same_in_every_plot_and_differ_between_methods():
    colours = method_colours(["epic", "cacheblend", "mine", "other"])
    assert colours["epic"] == method_colours(["epic"])["epic"]
    assert len({colours[m] for m in ("epic", "cacheblend", "mine", "other")}) == 4
