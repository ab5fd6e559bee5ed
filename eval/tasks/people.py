"""people_qa: questions about invented people and places, answered by one passage or (two hops) by two.

Passages are natural prose of 60 to 150 words, each about one person or one town; the others are distractors
of the same form. Towns are the birthplaces of people, and people are the mayors of towns, so that a second
hop is always in the prompt.
"""

import random

import pydantic

from lmcache_blend.config import Config
from lmcache_blend.eval.tasks import people_text as text
from lmcache_blend.eval.tasks.base import register_task
from lmcache_blend.eval.tasks.generated import generate
from lmcache_blend.eval.tasks.sample import Task


class PeopleOptions(Config):
    """Size of the set's prompts."""

    passages: int = pydantic.Field(default=10, ge=2, le=200)
    """Number of passages, half of them about people, half about towns."""
    words: int = pydantic.Field(default=110, ge=60, le=150)
    """Words in each passage, about."""
    two_hop: float = pydantic.Field(default=0.5, ge=0.0, le=1.0)
    """Share of the questions that need two passages."""


Entity = dict[str, str]


@register_task("people_qa", PeopleOptions)
def people_qa(limit: int, seed: int, options: PeopleOptions) -> Task:
    """Questions about invented people and places."""
    return generate("people_qa", "qa", limit, seed, lambda rng: _sample(rng, options))


def _sample(rng: random.Random, options: PeopleOptions) -> tuple:
    places = _places(rng, options.passages // 2)
    people = _people(rng, options.passages - len(places), places)
    for place, person in zip(rng.sample(places, len(places)), people, strict=False):
        place["mayor"] = person["name"]
    question, answer, needed = _question(rng, people, places, rng.random() < options.two_hop)
    passages = [_prose(rng, p, text.PERSON, text.PERSON_FILLERS, needed, options.words) for p in people]
    passages += [_prose(rng, p, text.PLACE, text.PLACE_FILLERS, needed, options.words) for p in places]
    rng.shuffle(passages)
    return question, passages, (answer,)


def _question(
    rng: random.Random, people: list[Entity], places: list[Entity], two_hop: bool
) -> tuple[str, str, set[str]]:
    """The question, its answer, and the facts that every passage has to tell, lest only the gold ones do."""
    person, place = rng.choice(people), rng.choice([p for p in places if "mayor" in p])
    from_person = rng.random() < 0.5
    if not two_hop:
        subject, asks = (person, text.ASK_PERSON) if from_person else (place, text.ASK_PLACE)
        fact = rng.choice(sorted(asks))
        return asks[fact].format(**subject), _answer(subject, fact), {fact}
    if from_person:
        fact = rng.choice(sorted(text.ASK_BIRTHPLACE))
        home = next(p for p in places if p["name"] == person["birthplace"])
        return text.ASK_BIRTHPLACE[fact].format(**person), _answer(home, fact), {"birthplace", fact}
    fact = rng.choice(sorted(text.ASK_MAYOR))
    mayor = next(p for p in people if p["name"] == place["mayor"])
    return text.ASK_MAYOR[fact].format(**place), _answer(mayor, fact), {"mayor", fact}


def _answer(subject: Entity, fact: str) -> str:
    return subject[text.ANSWER_FIELD.get(fact, fact)]


def _prose(
    rng: random.Random,
    subject: Entity,
    facts: dict[str, list[str]],
    fillers: list[str],
    needed: set[str],
    words: int,
) -> str:
    """The subject's passage: facts and fillers in any order, `words` words at most, the name first.

    Any fact may come first or last, so that no policy gains by a place where answers always stand.
    """
    forms = {fact: rng.choice(forms) for fact, forms in facts.items() if fact != "mayor" or "mayor" in subject}
    kept = [forms.pop(fact) for fact in facts if fact in needed and fact in forms]
    if not kept:
        kept = [forms.pop(rng.choice(sorted(forms)))]
    pool = [*forms.values(), *fillers]
    rng.shuffle(pool)
    while pool and _count(subject, [*kept, pool[-1]]) <= words:
        kept.append(pool.pop())
    rng.shuffle(kept)
    first = rng.choice([i for i, form in enumerate(kept) if form not in fillers])
    opening, rest = kept[first], kept[:first] + kept[first + 1 :]
    return " ".join(
        [_tell(opening, subject, subject["name"]), *(_tell(form, subject, subject["later"]) for form in rest)]
    )


def _count(subject: Entity, forms: list[str]) -> int:
    """Words of the sentences at most, whether they name the subject or not."""
    names = (subject["name"], subject["later"])
    return sum(max(len(_tell(form, subject, who).split()) for who in names) for form in forms)


def _tell(form: str, subject: Entity, who: str) -> str:
    """A sentence about the subject, called `who`."""
    return form.format(**subject, who=who, Who=who[0].upper() + who[1:])


def _people(rng: random.Random, count: int, places: list[Entity]) -> list[Entity]:
    names = _pairs(rng, text.WOMEN + text.MEN, text.SURNAMES, 2 * count, " ")
    columns = {
        "job": text.JOBS,
        "instrument": text.INSTRUMENTS,
        "pet": text.PETS,
        "pet_name": text.PET_NAMES,
        "dish": text.DISHES,
        "prize": text.PRIZES,
        "birthplace": [place["name"] for place in places],
    }
    drawn = {field: _cycle(rng, pool, count) for field, pool in columns.items()}
    people = []
    for i in range(count):
        born = rng.randint(1931, 1989)
        own = {
            "name": names[i],
            "spouse": names[count + i],
            "born": str(born),
            "prize_year": str(born + rng.randint(25, 33)),
        }
        pronouns = _SHE if names[i].split()[0] in text.WOMEN else _HE
        people.append({field: values[i] for field, values in drawn.items()} | own | pronouns)
    return people


_SHE = {"later": "she", "he": "she", "He": "She", "his": "her", "him": "her"}
_HE = {"later": "he", "he": "he", "He": "He", "his": "his", "him": "him"}


def _places(rng: random.Random, count: int) -> list[Entity]:
    names = _pairs(rng, text.TOWN_STARTS, text.TOWN_ENDS, count, "")
    columns = {
        "river": text.RIVERS,
        "known": text.GOODS,
        "festival": text.FESTIVALS,
        "arches": text.ARCHES,
        "month": text.MONTHS,
    }
    drawn = {field: _cycle(rng, pool, count) for field, pool in columns.items()}
    return [
        {field: values[i] for field, values in drawn.items()}
        | {"name": names[i], "later": "the town", "founded": str(rng.randint(1104, 1893))}
        for i in range(count)
    ]


def _pairs(rng: random.Random, starts: list[str], ends: list[str], count: int, between: str) -> list[str]:
    """`count` different names; no start and no end comes a second time before all were used."""
    found: dict[str, None] = {}
    while len(found) < count:
        size = count - len(found)
        pairs = zip(_cycle(rng, starts, size), _cycle(rng, ends, size), strict=True)
        found |= dict.fromkeys(a + between + b for a, b in pairs)
    return list(found)


def _cycle(rng: random.Random, pool: list[str], count: int) -> list[str]:
    """`count` values in random order, none a second time before all were used."""
    out: list[str] = []
    while len(out) < count:
        out += rng.sample(pool, len(pool))
    return out[:count]
