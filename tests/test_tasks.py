"""Tasks: generated samples, local files, hub rows; and the prompts that they become."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lmcache_blend.errors import ConfigError, DataError, UnknownNameError
from lmcache_blend.eval.tasks import (
    KINDS,
    Sample,
    Task,
    answer_tokens,
    build_prompt,
    hub,
    load_task,
    post_process,
    task_options,
    tasks,
)
from lmcache_blend.eval.tasks.haystack import sentences
from lmcache_blend.eval.tasks.jsonl import hold_back_end
from lmcache_blend.eval.tasks.people_text import MEN, TOWN_ENDS, TOWN_STARTS, WOMEN
from lmcache_blend.eval.tasks.prompts import LM_TAIL_TOKENS, TEMPLATES

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
GENERATED = ["key_value", "multi_key", "needle", "people_qa", "variable_tracing"]
BOS, EOS = "<s>", "</s>"


def byte_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """One token a byte, so that token ids spell the text; with or without a BOS of its own."""
    vocabulary = {symbol: i for i, symbol in enumerate([BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def sentencepiece_like(words: list[str]) -> PreTrainedTokenizerFast:
    """Words behind a '▁' that is also put before the text, as Llama 2's tokenizer does."""
    pieces = ["<unk>", "▁", ":", *{f"▁{w}" for w in words}, *words]
    tokenizer = Tokenizer(models.Unigram([(p, -float(len(pieces) - i)) for i, p in enumerate(pieces)], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


PLAIN, WITH_BOS = byte_tokenizer(bos=False), byte_tokenizer(bos=True)


def spelled(prompt, tokenizer=PLAIN) -> str:
    return tokenizer.decode(prompt.tokens, skip_special_tokens=True)


def span_texts(prompt) -> list[str]:
    return [PLAIN.decode(prompt.tokens[a:b]) for a, b in prompt.spans]


def row(**changes) -> dict:
    return {"id": "a", "task": "qa", "question": "q?", "contexts": ["text"], "answers": ["x"]} | changes


def write(path: Path, *rows) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


class TestGenerated:
    @pytest.mark.parametrize("name", GENERATED)
    def test_same_seed_same_samples_and_a_larger_limit_adds(self, name):
        few, many = load_task(name, None, 3, 7), load_task(name, None, 5, 7)
        assert many.samples[:3] == few.samples
        assert load_task(name, None, 3, 8).samples != few.samples
        assert len({s.id for s in many.samples}) == 5
        assert few.kind in KINDS
        assert few.name == name

    @pytest.mark.parametrize("name", GENERATED)
    def test_the_answer_stands_in_the_passages_but_not_in_the_question(self, name):
        for sample in load_task(name, None, 30, 0).samples:
            assert len(sample.contexts) == 10
            assert any(sample.answers[0] in passage for passage in sample.contexts)
            assert sample.answers[0] not in sample.question

    @pytest.mark.parametrize("name", ["needle", "multi_key", "variable_tracing"])
    def test_haystack_sizes(self, name):
        sample = load_task(name, None, 1, 0, passages=3, words=40).samples[0]
        assert len(sample.contexts) == 3
        assert all(40 <= len(p.split()) < 160 for p in sample.contexts)

    def test_haystack_is_plain_english_prose(self):
        paragraphs = sentences()
        text = " ".join(s for p in paragraphs for s in p)
        assert len(text.split()) > 5000
        assert sum(word in ("the", "of", "a", "is", "and", "to") for word in text.split()) > 0.15 * len(text.split())
        assert not set("{}|<>`*=") & set(text)

    def test_multi_key_holds_every_needle_once(self):
        for sample in load_task("multi_key", None, 5, 1, needles=12, passages=4, words=30).samples:
            text = " ".join(sample.contexts)
            assert text.count("The special magic number for ") == 12
            key = sample.question.split(" for ")[1].split(" mentioned")[0]
            assert f"The special magic number for {key} is: {sample.answers[0]}." in text

    def test_key_value_passages_are_json_and_hold_the_pair(self):
        for sample in load_task("key_value", None, 5, 1, passages=4, pairs=6).samples:
            objects = [json.loads(passage) for passage in sample.contexts]
            assert [len(o) for o in objects] == [6, 6, 6, 6]
            assert {k: v for o in objects for k, v in o.items()}[sample.question] == sample.answers[0]

    @pytest.mark.parametrize("hops", [1, 4])
    def test_variable_tracing_sets_before_it_reads_and_the_chain_leads_to_the_answer(self, hops):
        for sample in load_task("variable_tracing", None, 10, 2, hops=hops, chains=3, passages=3, words=30).samples:
            words = " ".join(sample.contexts).split()
            at = [i for i, word in enumerate(words[:-3]) if word == "VAR" and words[i + 2] == "="]
            assert len(at) == 3 * (hops + 1)
            values: dict[str, str] = {}
            for i in at:
                right = words[i + 4] if words[i + 3] == "VAR" else words[i + 3]
                values[words[i + 1]] = values[right.rstrip(".")] if words[i + 3] == "VAR" else right.rstrip(".")
            asked = sample.question.split("VAR ")[-1].split()[0]
            assert values[asked] == sample.answers[0]

    @pytest.mark.parametrize("words", [60, 110, 150])
    def test_people_passages_have_their_length_and_read_as_prose(self, words):
        for sample in load_task("people_qa", None, 5, 3, words=words).samples:
            for passage in sample.contexts:
                assert words - 30 <= len(passage.split()) <= words
                assert passage[0].isupper()
                assert passage.endswith(".")
                assert "{" not in passage

    def test_people_one_hop_questions_are_answered_by_the_passage_about_whom_they_name(self):
        for sample in load_task("people_qa", None, 40, 0, two_hop=0).samples:
            about = [p for p in sample.contexts if _subject(p) in sample.question]
            assert len(about) == 1
            assert sample.answers[0] in about[0]

    def test_people_two_hop_questions_need_two_passages(self):
        for sample in load_task("people_qa", None, 40, 0, two_hop=1).samples:
            passages = {_subject(p): p for p in sample.contexts}
            asked = [name for name in passages if name in sample.question]
            assert len(asked) == 1
            first = passages[asked[0]]
            link = _BORN.search(first) if "was born" in sample.question else _MAYOR.search(first)
            assert link is not None
            second = passages[next(group for group in link.groups() if group)]
            assert sample.answers[0] in second
            assert sample.answers[0] not in first

    def test_people_names_are_unique_in_a_large_prompt(self):
        sample = load_task("people_qa", None, 1, 0, passages=200, words=60).samples[0]
        assert len(sample.contexts) == len(set(sample.contexts)) == 200

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("needle", {"pasages": 3}, "did you mean 'passages'"),
            ("needle", {"passages": 0}, "passages = 0"),
            ("people_qa", {"words": 59}, "words = 59"),
            ("people_qa", {"two_hop": 1.5}, "two_hop = 1.5"),
            ("key_value", {"passages": 100, "pairs": 100}, "passages \\* pairs = 10000"),
            ("variable_tracing", {"chains": 50, "hops": 50}, "chains \\* \\(hops \\+ 1\\) = 2550"),
        ],
    )
    def test_options_are_checked(self, name, options, message):
        with pytest.raises(ConfigError, match=message):
            load_task(name, None, 1, 0, **options)

    def test_names_limits_and_options_of_a_file_are_checked(self, tmp_path):
        with pytest.raises(UnknownNameError, match="did you mean 'needle'"):
            load_task("needel", None, 1, 0)
        with pytest.raises(ConfigError, match="limit = 0"):
            load_task("needle", None, 0, 0)
        with pytest.raises(ConfigError, match="no task options, got: words"):
            load_task("mine", write(tmp_path / "a.jsonl", row()), 1, 0, words=3)


_BORN = re.compile(r"(?:born|world) in (\w+) in (?:the winter of )?\d{4}")
_MAYOR = re.compile(r"mayor of [\w ]+ is (\w+ \w+),|(\w+ \w+) is the mayor of")


def _subject(passage: str) -> str:
    """Whom a passage is about: the town or the person that its first sentence names."""
    first = passage.split(". ")[0]
    names = re.findall(rf"(?:{'|'.join(WOMEN + MEN)}) [A-Z]\w+", first)
    towns = re.findall(rf"(?:{'|'.join(TOWN_STARTS)})(?:{'|'.join(TOWN_ENDS)})", first)
    return names[0] if names and "mayor" not in first else towns[0]


class TestRegistry:
    def test_options_are_visible_to_whoever_routes_them(self):
        assert task_options("multi_key") == ("passages", "words", "needles")
        assert task_options("samsum") == ()

    def test_a_plain_function_is_a_task_too(self):
        @tasks.register("test-plain")
        def plain(limit: int, seed: int, size: int = 1) -> Task:
            return Task("test-plain", "qa", (Sample("a", "q", ("c",) * size, ("x",)),), 4)

        assert task_options("test-plain") == ("size",)
        assert len(load_task("test-plain", None, 1, 0, size=3).samples[0].contexts) == 3

    def test_every_registered_task_says_what_it_is(self):
        assert all(tasks.get(name).__doc__ for name in [*GENERATED, "2wikimqa", "samsum", "longbench/trec"])


class TestJsonl:
    def test_reads_samples_and_leaves_unknown_fields_alone(self, tmp_path):
        path = write(tmp_path / "mine.jsonl", row(extra=1), "", row(id="b", contexts=["", "c"], answers=[]))
        task = load_task("", path, 5, 0)
        assert (task.name, task.kind) == ("mine", "qa")
        assert task.samples == (Sample("a", "q?", ("text",), ("x",)), Sample("b", "q?", ("c",), ()))
        assert load_task("other", path, 1, 0).name == "other"

    def test_seed_0_keeps_the_order_and_others_shuffle_it(self, tmp_path):
        path = write(tmp_path / "a.jsonl", *(row(id=str(i)) for i in range(30)))
        order = lambda limit, seed: [s.id for s in load_task("", path, limit, seed).samples]  # noqa: E731
        assert order(30, 0) == [str(i) for i in range(30)]
        assert order(30, 5) != order(30, 0)
        assert sorted(order(30, 5)) == sorted(order(30, 0))
        assert order(30, 5)[:10] == order(10, 5)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"id": "b", ', "line 3: not JSON"),
            ('{"id": NaN2}', "line 3: not JSON"),
            ("[1, 2]", "line 3: a JSON object was expected, not a list"),
            (
                {"id": "b", "task": "qa", "question": "q", "answers": []},
                "line 3: field 'contexts' is missing",
            ),
            (row(id="b", question=None), "line 3: field 'question' must be a text, not null"),
            (row(id=7), "line 3: field 'id' must be a text, not a number"),
            (row(id="b", contexts="text"), "line 3: field 'contexts' must be a list of texts, not a text"),
            (row(id="b", answers=["x", 5]), r"line 3: field 'answers'\[1\] must be a text, not a number"),
            (row(id="b", task="q"), "line 3: task = 'q': did you mean 'qa'"),
            (row(id="b", task="kv"), "line 3: task 'kv' differs from 'qa'"),
            (row(), "line 3: id 'a' is also that of line 1"),
            (row(id=""), "line 3: field 'id' is empty"),
            (row(id="b", contexts=["x\ud800"]), r"line 3: field 'contexts'\[0\] is no valid Unicode text"),
            ('{"id": ' + "9" * 5000 + "}", "line 3: not JSON"),
            (row(id="b", question=" ", contexts=[]), "line 3: both 'question' and 'contexts' are empty"),
        ],
    )
    def test_a_broken_line_is_named(self, tmp_path, line, message):
        path = write(tmp_path / "broken.jsonl", row(), "", line)
        with pytest.raises(DataError, match=message) as caught:
            load_task("x", path, 1, 0)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_bytes_that_are_no_text_are_named(self, tmp_path):
        path = tmp_path / "latin.jsonl"
        path.write_bytes(json.dumps(row()).encode() + b'\n{"id": "\xe9"}\n')
        with pytest.raises(DataError, match="line 2: not UTF-8"):
            load_task("x", path, 1, 0)

    def test_missing_and_empty_files(self, tmp_path):
        with pytest.raises(DataError, match=r"none.jsonl: No such file"):
            load_task("x", tmp_path / "none.jsonl", 1, 0)
        with pytest.raises(DataError, match="Is a directory"):
            load_task("x", tmp_path, 1, 0)
        with pytest.raises(DataError, match="holds no samples"):
            load_task("x", write(tmp_path / "empty.jsonl", ""), 1, 0)

    @given(st.text(alphabet="ab \n\t\u00a0", max_size=80), st.integers(1, 9))
    @settings(max_examples=60, deadline=None)
    def test_language_modelling_holds_back_the_last_words(self, text, words):
        before = Sample("a", "", (text,) if text.strip() else (), ())
        after = hold_back_end(before, words)
        held = after.answers[0].split() if after.answers else []
        assert " ".join([*after.contexts, *after.answers]).split() == text.split()
        assert len(held) == min(words, len(text.split()) // 2)


class TestPrompts:
    sample = Sample("a", "Who?", ("First text.", "Zweiter Täxt 🙂.", "third"), ("Ann B.", "Bob"))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["plain", "bos"])
    def test_pieces_spell_the_prompt_and_the_question_is_outside_the_spans(self, kind, tokenizer):
        template = TEMPLATES[kind]
        prompt = build_prompt(self.sample, kind, tokenizer)
        texts = [template.prefix, *map(template.passage.format, self.sample.contexts)]
        assert span_texts(prompt)[-3:] == texts[1:]
        assert spelled(prompt).startswith("".join(texts))
        assert spelled(prompt).endswith(template.question.format("Who?") + template.cue)
        assert prompt.prefix == bool(template.prefix or tokenizer is WITH_BOS)
        assert (int(prompt.tokens[0]) == tokenizer.bos_token_id) == (tokenizer is WITH_BOS)
        assert sum(b - a for a, b in prompt.spans) == prompt.spans[-1][1]

    @pytest.mark.parametrize("kind", KINDS)
    def test_without_context_only_instructions_and_question_are_left(self, kind):
        full = build_prompt(self.sample, kind, WITH_BOS)
        bare = build_prompt(self.sample, kind, WITH_BOS, with_context=False)
        prefix, question = full.spans[0][1], full.spans[-1][1]
        assert bare.tokens.tolist() == full.tokens[:prefix].tolist() + full.tokens[question:].tolist()
        assert bare.spans == (full.spans[0],)

    @given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=4), st.integers(1, 30), st.randoms())
    @settings(max_examples=40, deadline=None)
    def test_passages_have_the_same_ids_wherever_they_stand(self, texts, chunk_tokens, rng: random.Random):
        prompt = build_prompt(Sample("a", "q", tuple(texts), ()), "qa", PLAIN, chunk_tokens=chunk_tokens)
        shuffled = rng.sample(texts, len(texts))
        other = build_prompt(Sample("a", "q", tuple(shuffled), ()), "qa", PLAIN, chunk_tokens=chunk_tokens)
        pieces = lambda p: sorted(tuple(p.tokens[a:b].tolist()) for a, b in p.spans)  # noqa: E731
        assert pieces(prompt) == pieces(other)
        assert all(b - a <= chunk_tokens for a, b in prompt.spans[1:])
        assert spelled(prompt) == spelled(build_prompt(Sample("a", "q", tuple(texts), ()), "qa", PLAIN))

    def test_a_text_without_a_question_keeps_its_end_outside_the_spans(self):
        sample = Sample("a", "", ("one two three four five",), ("six",))
        prompt = build_prompt(sample, "lm", PLAIN)
        assert spelled(prompt) == sample.contexts[0]
        assert len(prompt) - prompt.spans[-1][1] == LM_TAIL_TOKENS
        assert not prompt.prefix
        bare = build_prompt(sample, "lm", PLAIN, with_context=False)
        assert spelled(bare) == sample.contexts[0][-LM_TAIL_TOKENS:]
        short = build_prompt(Sample("a", "", ("one",), ()), "lm", WITH_BOS)
        assert short.spans == ((0, 1),)
        assert spelled(short) == "one"

    def test_a_cue_is_not_said_twice(self):
        chat = Sample("a", "Which topic? ASSISTANT:", ("USER: hello",), ())
        assert spelled(build_prompt(chat, "topic", PLAIN)).endswith("\nUSER: Which topic? ASSISTANT:")

    def test_answers_follow_the_prompt(self):
        spell = lambda kind: PLAIN.decode(answer_tokens(self.sample, kind, PLAIN))  # noqa: E731
        assert spell("qa") == " Ann B."
        assert spell("kv") == ' "Ann B."'
        assert spell("math") == " The answer is Ann B.."
        assert len(answer_tokens(self.sample, "qa", PLAIN, limit=3)) == 3
        assert answer_tokens(Sample("a", "q", ("c",), ()), "fidelity", PLAIN) is None

    def test_answers_get_no_second_space_from_a_sentencepiece_tokenizer(self):
        tokenizer = sentencepiece_like(["Answer", "Paris"])
        assert tokenizer.convert_ids_to_tokens(tokenizer(" Paris")["input_ids"]) == ["▁", "▁Paris"]
        tokens = answer_tokens(Sample("a", "q", (), ("Paris",)), "qa", tokenizer)
        assert tokenizer.convert_ids_to_tokens(tokens.tolist()) == ["▁Paris"]

    @pytest.mark.parametrize("kind", sorted(set(KINDS) - {"math"}))
    def test_a_written_answer_is_read_back(self, kind):
        text = PLAIN.decode(answer_tokens(self.sample, kind, PLAIN))
        assert post_process(text, kind).rstrip() == "Ann B."
        assert post_process(text + "\n\nText: another", kind).startswith("Ann B.")

    @pytest.mark.parametrize(
        ("text", "kind", "answer"),
        [
            (" Paris\nQuestion: next", "qa", "Paris"),
            ("\n Paris\nLondon", "qa", "Paris"),
            (' "48-13",\n "x": 3', "kv", "48-13"),
            (" 2 + 2 = 4. The answer is 4. So 5", "math", "4"),
            (" it costs $1,250.50 in all", "math", "1250.50"),
            (" no idea", "math", "no idea"),
            (" One.\nTwo.\n\nText: new", "summ", "One.\nTwo."),
        ],
    )
    def test_post_process(self, text, kind, answer):
        assert post_process(text, kind) == answer

    def test_refusals(self):
        with pytest.raises(ConfigError, match="unknown kind of task 'qaa': did you mean 'qa'"):
            build_prompt(self.sample, "qaa", PLAIN)
        with pytest.raises(ConfigError, match="chunk_tokens = 0"):
            build_prompt(self.sample, "qa", PLAIN, chunk_tokens=0)
        with pytest.raises(ConfigError, match="neither a question nor a text"):
            build_prompt(Sample("a", "", (), ()), "qa", PLAIN)


LONGBENCH_ROW = {
    "input": "Where was the director of Skyward born?",
    "context": "Passage 1:\nSkyward (film)\nSkyward is a film by Ada Lund.\n\n"
    "Passage 2:\nAda Lund\nAda Lund was born in Bergen.\n",
    "answers": ["Bergen"],
    "length": 21,
    "dataset": "2wikimqa",
    "language": "en",
    "all_classes": None,
    "_id": "f3a1",
}


class TestHub:
    def test_longbench_passages_become_contexts(self):
        sample = hub.longbench_sample(LONGBENCH_ROW, "2wikimqa")
        assert sample == Sample(
            "longbench/2wikimqa/f3a1",
            "Where was the director of Skyward born?",
            ("Skyward (film)\nSkyward is a film by Ada Lund.", "Ada Lund\nAda Lund was born in Bergen."),
            ("Bergen",),
        )

    def test_summaries_ask_for_one_where_the_row_has_no_question(self):
        sample = hub.longbench_sample(LONGBENCH_ROW | {"input": ""}, "multi_news")
        assert sample.question == "Write a one-page summary of all news."
        assert len(sample.contexts) == 2

    def test_worked_examples_become_contexts_with_their_labels(self):
        context = "Dialogue: A: hi\nB: hello\nSummary: They greet.\nDialogue: A: bye\nSummary: A leaves."
        sample = hub.longbench_sample(
            LONGBENCH_ROW | {"context": context, "input": "Dialogue: A: so?\nSummary: "}, "samsum"
        )
        assert [c[:9] for c in sample.contexts] == ["Dialogue:", "Dialogue:"]
        assert spelled(build_prompt(sample, "fewshot", PLAIN)).endswith("Dialogue: A: so?\nSummary:")

    def test_samsum_dialogue_becomes_the_context(self):
        sample = hub.samsum_sample(
            {"id": "13818513", "dialogue": "Amanda: hi\r\nJerry: hey", "summary": "They greet. "}
        )
        assert sample == Sample(
            "samsum/13818513", "Summarize the dialogue.", ("Amanda: hi\r\nJerry: hey",), ("They greet.",)
        )

    def test_rows_of_a_real_dataset(self, tmp_path):
        rows = [{"id": str(i), "dialogue": "" if i == 1 else f"A: {i}", "summary": f"s{i}"} for i in range(8)]
        write(tmp_path / "test.jsonl", *rows)
        loaded = hub.load_rows(str(tmp_path), None, "test")
        take = lambda limit, seed: [  # noqa: E731
            s.id for s in hub.samples_of(loaded, hub.samsum_sample, limit, seed, "samsum")
        ]
        assert take(3, 0) == ["samsum/0", "samsum/2", "samsum/3"]
        assert take(5, 4)[:3] == take(3, 4)
        assert len(take(50, 4)) == 7
        with pytest.raises(DataError, match="set samsum, row 0: not in the expected layout"):
            hub.samples_of(loaded.remove_columns("summary"), hub.samsum_sample, 1, 0, "samsum")

    def test_no_datasets_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataError, match=r"needs the datasets package: pip install .* --data FILE.jsonl"):
            load_task("2wikimqa", None, 1, 0)

    def test_no_hub(self, monkeypatch, tmp_path, capfd):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        with pytest.raises(DataError) as caught:
            load_task("longbench/qasper", None, 1, 0)
        message = str(caught.value)
        assert message.startswith(f"cannot load set {hub.LONGBENCH} (qasper, test) from the hub: ")
        assert message.endswith("; --data FILE.jsonl reads local samples instead")
        assert "\n" not in message
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", GENERATED)
def test_every_generated_task_builds_prompts(name):
    _check_prompts(load_task(name, None, 2, 0))


@pytest.mark.parametrize(
    "path", sorted(SHARED.glob("*.jsonl")) or [None], ids=lambda path: path.stem if path else "none"
)
def test_every_shared_data_file_builds_prompts(path):
    if path is None:
        pytest.skip("no ../shared/data beside this checkout")
    lines = path.read_bytes().count(b"\n")
    assert len(load_task(path.stem, path, 10_000, 0).samples) == lines
    _check_prompts(load_task(path.stem, path, 2, 0))


def _check_prompts(task: Task) -> None:
    assert task.max_new_tokens > 0
    for sample in task.samples:
        prompt = build_prompt(sample, task.kind, PLAIN, chunk_tokens=512)
        bare = build_prompt(sample, task.kind, PLAIN, with_context=False)
        assert all(text.strip() in spelled(prompt) for text in sample.contexts)
        assert sample.question.strip() in spelled(bare)
        assert len(bare) + sum(b - a for a, b in prompt.spans[prompt.prefix :]) == len(prompt)
        answer = answer_tokens(sample, task.kind, PLAIN)
        assert (answer is None) == (not sample.answers)
