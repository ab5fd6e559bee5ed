"""Metrics against known values and naive references; statistics by their properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_blend.errors import ConfigError
from lmcache_blend.eval import metrics, stats

numbers = st.floats(-50, 50, allow_nan=False).map(lambda x: round(x, 6))
columns = st.lists(numbers, min_size=1, max_size=12)
few = settings(max_examples=40, deadline=None)


class TestTextScores:
    @pytest.mark.parametrize(
        ("prediction", "answers", "f1", "em", "contains"),
        [
            ("The Eiffel Tower!", ["eiffel tower"], 1, 1, 1),
            ("Eiffel Tower in Paris", ["Eiffel Tower"], 2 / 3, 0, 1),
            ("in Lyon", ["Paris"], 0, 0, 0),
            ("Lyon", ["Paris", "lyon"], 1, 1, 1),
            ("", ["Paris"], 0, 0, 0),
            ("", ["the"], 1, 1, 0),
            ("Parisian food", ["Paris"], 0, 0, 0),
            ("red red boat", ["red boat boat"], 2 / 3, 0, 0),
        ],
    )
    def test_known_values(self, prediction, answers, f1, em, contains):
        scores = metrics.text_scores(prediction, answers)
        assert scores["f1"] == pytest.approx(f1)
        assert (scores["em"], scores["contains"]) == (em, contains)

    def test_rouge_l_is_the_longest_common_subsequence(self):
        # Lin (2004), section 3.2: "police the gunman" is the longest common subsequence, 3 of 4 words.
        scores = metrics.text_scores("police ended the gunman", ["police killed the gunman"])
        assert scores["rouge_l"] == pytest.approx(3 / 4)
        assert metrics.text_scores("a b c", ["x y", "a b c"])["rouge_l"] == 1

    def test_takes_the_best_answer_for_each_score(self):
        alone = [metrics.text_scores("old red boat", [a]) for a in ("red ship", "old boat house", "boat")]
        together = metrics.text_scores("old red boat", ["red ship", "old boat house", "boat"])
        assert together == {name: max(s[name] for s in alone) for name in together}

    def test_needs_an_answer(self):
        with pytest.raises(ConfigError, match="at least one answer"):
            metrics.text_scores("x", [])

    @given(st.text(max_size=40))
    @few
    def test_a_text_equals_itself(self, text):
        scores = metrics.text_scores(text, [text])
        assert (scores["f1"], scores["em"]) == (1, 1)

    @given(st.text(max_size=30), st.text(max_size=30))
    @few
    def test_scores_lie_between_0_and_1_and_exact_match_implies_f1(self, a, b):
        scores = metrics.text_scores(a, [b])
        assert all(0 <= v <= 1 for v in scores.values())
        assert scores["f1"] == 1 or scores["em"] == 0


class TestLogitScores:
    def random(self, n=20, vocabulary=50, seed=0):
        g = torch.Generator().manual_seed(seed)
        draw = lambda: torch.randn(n, vocabulary, generator=g) * 4  # noqa: E731
        return draw(), draw(), torch.randint(vocabulary, (n,), generator=g)

    def test_equal_logits_have_no_divergence(self):
        logits, _, tokens = self.random()
        scores = metrics.logit_scores(logits, logits.clone(), tokens)
        assert scores["kl"] == pytest.approx(0, abs=1e-12)
        assert scores["top1_agreement"] == 1
        assert scores["nll"] == pytest.approx(metrics.nll(logits, tokens), rel=1e-12)

    def test_equals_the_definition_in_float64(self):
        # 20 rows: more than one block of rows, the last one not full.
        logits, reference, tokens = self.random(n=metrics.ROWS_AT_ONCE + 4)
        q, p = logits.double().softmax(-1), reference.double().softmax(-1)
        scores = metrics.logit_scores(logits, reference, tokens)
        assert scores["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-9)
        assert scores["nll"] == pytest.approx(float(-q[range(len(tokens)), tokens].log().mean()), rel=1e-9)
        same = [int(a.argmax() == b.argmax()) for a, b in zip(logits, reference, strict=True)]
        assert scores["top1_agreement"] == pytest.approx(sum(same) / len(same))

    def test_a_shift_of_all_logits_changes_nothing(self):
        logits, reference, tokens = self.random()
        shifted = metrics.logit_scores(logits + 300, reference - 7, tokens)
        assert shifted == pytest.approx(metrics.logit_scores(logits, reference, tokens), rel=1e-4)

    def test_known_divergence(self):
        reference, logits = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
        scores = metrics.logit_scores(logits, reference, torch.tensor([0]))
        assert scores["kl"] == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-6)
        assert scores["nll"] == pytest.approx(-math.log(0.75), rel=1e-6)

    def test_bfloat16_logits_and_tokens_ruled_out(self):
        reference = torch.tensor([[0.0, 1.0, -torch.inf]])
        scores = metrics.logit_scores(reference.bfloat16(), reference, torch.tensor([1]))
        assert scores["kl"] == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("tokens", [torch.tensor([1]), torch.tensor([], dtype=torch.long)])
    def test_refuses_shapes_that_do_not_fit(self, tokens):
        with pytest.raises(ConfigError, match=r"\[n, V\]"):
            metrics.nll(torch.zeros(2, 5)[: len(tokens) * 2], tokens)
        with pytest.raises(ConfigError, match="differ in shape"):
            metrics.logit_scores(torch.zeros(1, 5), torch.zeros(1, 6), torch.tensor([1]))


class TestStats:
    @given(columns)
    @few
    def test_interval_contains_the_mean_and_stays_in_range(self, values):
        interval = stats.bootstrap(values)
        assert interval.low <= interval.mean <= interval.high
        assert interval.mean == pytest.approx(np.mean(values))
        assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9

    @given(columns, numbers)
    @few
    def test_shift_moves_the_interval(self, values, shift):
        a, b = stats.bootstrap(values), stats.bootstrap([v + shift for v in values])
        assert (b.low, b.mean, b.high) == pytest.approx((a.low + shift, a.mean + shift, a.high + shift), abs=1e-9)

    def test_same_values_same_interval_and_more_samples_narrow_it(self):
        values = np.random.default_rng(3).normal(size=400)
        assert stats.bootstrap(values) == stats.bootstrap(list(values))
        wide, narrow = stats.bootstrap(values[:25]), stats.bootstrap(values)
        assert narrow.high - narrow.low < (wide.high - wide.low) / 2
        # A normal mean over 400 samples: 1.96 / 20 either side.
        assert narrow.high - narrow.mean == pytest.approx(0.098, rel=0.15)

    @given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=10))
    @few
    def test_quality_is_1_for_full_prefill_and_0_for_no_context(self, rows):
        none, other, full = (np.array(column) for column in zip(*rows, strict=True))
        gain = float((none - full).sum())
        if gain == 0:
            assert math.isnan(stats.normalised_quality(none, other, full).mean)
            return
        best, worst = stats.normalised_quality(none, full, full), stats.normalised_quality(none, none, full)
        assert (best.low, best.mean, best.high) == pytest.approx((1, 1, 1))
        assert (worst.low, worst.mean, worst.high) == pytest.approx((0, 0, 0))
        half = stats.normalised_quality(none, (none + full) / 2, full)
        assert half.mean == pytest.approx(0.5)
        assert half.low <= half.mean <= half.high

    def test_quality_is_a_ratio_of_sums(self):
        quality = stats.normalised_quality([4.0, 2.0], [2.0, 2.0], [0.0, 2.0])
        assert quality.mean == pytest.approx(2 / 4)
        assert stats.normalised_quality([1.0, 1.0], [1.0, 1.0], [1.0, 1.0]).high != 0  # NaN, not a number made up

    def test_signal_needs_an_interval_above_zero(self):
        rng = np.random.default_rng(0)
        none = rng.normal(5, 1, size=30)
        assert stats.has_signal(none, none - 1)
        assert not stats.has_signal(none, none + 1)
        assert not stats.has_signal(none, none)
        assert not stats.has_signal(none, none - rng.normal(0, 1, size=30))
        assert not stats.has_signal([5.0], [1.0])

    def test_pairing_removes_what_samples_share(self):
        rng = np.random.default_rng(1)
        hard = rng.normal(0, 10, size=40)
        a, b = hard + 1 + rng.normal(0, 0.1, 40), hard
        gap = stats.paired_difference(a, b)
        assert 0.9 < gap.low < gap.high < 1.1

    def test_refuses_rows_that_do_not_match(self):
        with pytest.raises(ConfigError, match="equal rows"):
            stats.paired_difference([1.0], [1.0, 2.0])
        with pytest.raises(ConfigError, match="0 samples"):
            stats.bootstrap([])
