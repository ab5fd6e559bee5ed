"""From a sample to token ids and back to an answer.

A prompt is [instructions][passage 1]...[passage n][question]. Every piece is tokenised on its own and the ids
are joined, so that a passage has the same ids wherever it stands. Instructions and passages are spans whose
KV may be reused; the question is outside every span. The format is plain text behind worked examples, not a
chat template, so that base models and small ones can be measured too.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmcache_blend.errors import ConfigError, nearest
from lmcache_blend.eval.tasks.sample import KINDS, Sample, Task
from lmcache_blend.types import Prompt

LM_TAIL_TOKENS = 8
"""Tokens of a text without a question that stay outside the spans: a prompt must end outside of one."""


@dataclass(frozen=True)
class Template:
    """Texts of one kind of task; {} stands for the passage, the question or the answer.

    cue: ends the question. stop: regular expression; what a model writes from there on is no answer any more.
    """

    prefix: str
    passage: str
    question: str
    cue: str
    answer: str = " {}"
    stop: str = r"\n"


QA = Template(
    prefix=(
        "Answer each question with a few words taken from the passages.\n\n"
        "Passage: The Tolland lighthouse was built in 1874 by the engineer Maria Hask. It is 31 metres tall "
        "and stands on a rock two miles off the coast. A keeper lived there until 1962, when the lamp became "
        "electric.\n"
        "Question: Who built the Tolland lighthouse?\n"
        "Answer: Maria Hask\n\n"
        "Passage: Anton Verrel grew up in Brackwater and became a baker like his mother.\n"
        "Passage: Brackwater is a small town on the river Ouse. It is known for its market of glass and "
        "copper.\n"
        "Question: What is the town where Anton Verrel grew up known for?\n"
        "Answer: its market of glass and copper\n\n"
    ),
    passage="Passage: {}\n",
    question="Question: {}",
    cue="\nAnswer:",
)

TEMPLATES: dict[str, Template] = {
    "qa": QA,
    "fidelity": QA,
    "kv": Template(
        prefix="Look up the value of a key in the JSON data below.\n\n",
        passage="{}\n",
        question='The value of the key that was asked for:\n{{"{}"',
        cue=":",
        answer=' "{}"',
        stop=r"[\n,}]",
    ),
    "needle": Template(
        prefix=(
            "A fact is hidden in the text. Answer the question with that fact alone.\n\n"
            "Text: The office opens at nine. The access code of the north gate is: 90175. Boats are checked "
            "on Mondays.\n"
            "Question: What is the access code of the north gate mentioned in the provided text?\n"
            "Answer: 90175\n\n"
        ),
        passage="Text: {}\n",
        question="Question: {}",
        cue="\nAnswer:",
    ),
    "summ": Template(
        prefix="Read the text and do the task below it.\n\n",
        passage="Text: {}\n\n",
        question="Task: {}",
        cue="\nSummary:",
        stop=r"\n+(Text|Task|Summary):",
    ),
    "math": Template(
        prefix=(
            "Solve each problem step by step.\n\n"
            "Question: A box holds 6 pens. Nora buys 4 boxes and gives 5 pens away. How many does she keep?\n"
            "Answer: She buys 4 * 6 = 24 pens. She keeps 24 - 5 = 19 pens. The answer is 19.\n\n"
            "Question: A tram ride costs $3. Ivo rides twice a day for 5 days, with $40. How much is left?\n"
            "Answer: He rides 2 * 5 = 10 times. The rides cost 10 * 3 = $30. He has 40 - 30 = $10 left. "
            "The answer is 10.\n\n"
        ),
        passage="{}\n",
        question="Question: {}",
        cue="\nAnswer:",
        answer=" The answer is {}.",
        stop=r"\n",
    ),
    "topic": Template(
        prefix="A long chat about several topics, and a question about it at the end.\n\n",
        passage="{}",
        question="\nUSER: {}",
        cue=" ASSISTANT:",
    ),
    "fewshot": Template(
        prefix="Here are some worked examples. Answer the last one in the same way.\n\n",
        passage="{}\n",
        question="{}",
        cue="",
    ),
    "lm": Template(prefix="", passage="{}", question="{}", cue="", stop=r"(?!)"),
}


def build_prompt(
    sample: Sample, kind: str, tokenizer: Any, *, with_context: bool = True, chunk_tokens: int = 512
) -> Prompt:
    """The prompt of a sample for a Hugging Face tokenizer, ready for its answer.

    First span: the instructions, behind the BOS token where the tokenizer adds one (prefix=True); then the
    passages, one span each, those longer than chunk_tokens cut into several; then the question. Without
    context only instructions and question are left. A sample without a question (language modelling) keeps
    the last 8 tokens of its text outside the spans in its place, with and without context. Raises ConfigError
    (kind, chunk_tokens, nothing to ask).
    """
    template = _template(kind)
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens = {chunk_tokens}: a span needs at least 1 token")
    prefix = _bos(tokenizer) + _encode(tokenizer, template.prefix)
    passages = [_encode(tokenizer, template.passage.format(text)) for text in sample.contexts]
    question = _encode(tokenizer, _question(template, sample.question)) if sample.question.strip() else []
    if not question and passages:
        passages[-1], question = passages[-1][:-LM_TAIL_TOKENS], passages[-1][-LM_TAIL_TOKENS:]
    if not question:
        raise ConfigError(f"sample {sample.id!r} has neither a question nor a text; give it one")
    parts = [part[at : at + chunk_tokens] for part in passages for at in range(0, len(part), chunk_tokens)]
    return Prompt.join(parts if with_context else [], question, prefix)


def nearest_prompts(task: Task, runner: Any, tokens: int, count: int) -> list[Prompt]:
    """Those `count` prompts of a task that fit into the model and are nearest to a length. Raises ConfigError."""
    prompts = [build_prompt(sample, task.kind, runner.tokenizer) for sample in task.samples]
    fitting = [prompt for prompt in prompts if len(prompt) <= runner.max_tokens]
    if not fitting:
        shortest = min(map(len, prompts))
        raise ConfigError(f"{task.name} has prompts of {shortest} tokens or more, the model takes {runner.max_tokens}")
    return sorted(fitting, key=lambda prompt: abs(len(prompt) - tokens))[:count]


def answer_tokens(sample: Sample, kind: str, tokenizer: Any, limit: int = 64) -> Tensor | None:
    """[n] int64: the first answer as it follows the prompt, at most `limit` tokens; None without one."""
    if not sample.answers or not sample.answers[0].strip():
        return None
    template = _template(kind)
    answer = template.answer.format(sample.answers[0].strip())
    cue = template.cue or "."
    before, both = _encode(tokenizer, cue), _encode(tokenizer, cue + answer)
    # Behind the cue, not alone: SentencePiece tokenizers put a space of their own before a new text.
    ids = both[len(before) :] if both[: len(before)] == before else _encode(tokenizer, answer)
    return torch.tensor(ids[:limit], dtype=torch.long) if ids else None


def post_process(text: str, kind: str) -> str:
    """The answer in what a model wrote: cut where it goes on to something else, quotes and spaces stripped.

    >>> post_process(" Maria Hask\\nQuestion: Who", "qa")
    'Maria Hask'
    >>> post_process(" She keeps 24 - 5 = 19. The answer is 1,219.", "math")
    '1219'
    """
    answer = re.split(_template(kind).stop, text.lstrip() if kind != "lm" else text, maxsplit=1)[0].strip()
    if kind == "kv":
        return answer.strip("\"' ")
    if kind == "math":
        return _last_number(answer) or answer
    return answer


def _last_number(text: str) -> str | None:
    """The number behind "answer is", else the last one, without thousands separators."""
    number = r"-?\d[\d,]*(?:\.\d+)?"
    named = re.findall(rf"answer is:?\s*\$?({number})", text)
    found = named or re.findall(number, text)
    return found[-1].replace(",", "") if found else None


def _question(template: Template, question: str) -> str:
    """The question in its template; a cue that it ends with already is not said twice."""
    text = template.question.format(question.strip())
    return text.removesuffix(template.cue.strip()).rstrip() + template.cue if template.cue else text


def _template(kind: str) -> Template:
    try:
        return TEMPLATES[kind]
    except KeyError:
        raise ConfigError(f"unknown kind of task {kind!r}: {nearest(kind, KINDS)}") from None


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: a passage longer than the model is cut into spans, so the warning would mislead.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def _bos(tokenizer: Any) -> list[int]:
    """[BOS] where the tokenizer has that token and puts it before a text by itself, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
