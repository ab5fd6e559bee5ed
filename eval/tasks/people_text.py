"""Words and sentences that people_qa writes its passages with. All people and places are invented."""

from lmcache_blend.eval.tasks.words import phrases, words

WOMEN = words(
    """
    Agnes Beatrix Clara Delia Edith Flora Greta Hanna Ingrid Johanna Katrin Leonie Mabel Nadia Odile Petra
    Rosalind Sabine Thea Ursula Vera Wilma Yvonne Zelda
    """
)
MEN = words(
    """
    Albin Bastian Conrad Dorian Emil Felix Gustav Henrik Ivan Jasper Klaus Lorenz Magnus Nestor Oskar Paul
    Quentin Rupert Silas Tobias Ulrich Viktor Walter Xaver
    """
)
SURNAMES = words(
    """
    Abernathy Ashdown Bellweather Brandt Carrow Castellan Dunmore Eastlake Fairholm Falkner Garrick Greaves
    Halloran Hartwell Inkpen Jarrow Kestrel Kingsley Lindqvist Lockhart Marchetti Merriweather Northcote
    Oakham Osterley Pemberton Quillfeather Ravensdale Rosewall Sandoval Selwyn Thackeray Thornbury Umberton
    Vandermeer Vossler Wainwright Westerholt Yarrow Zellweger
    """
)
TOWN_STARTS = words(
    """
    Alder Birken Brack Claver Crow Dun Elm Fen Glass Hallow Harrow Iron Kings Lark Marl Mill Nether Otter
    Pen Quarry Raven Salt Stone Thistle Under Wester Whit Wind Wolf Yar
    """
)
TOWN_ENDS = words(
    """
    bridge bury combe dale ford gate ham haven holt marsh mere mouth ridge stead ton vale well wick worth
    """
)
JOBS = phrases(
    """
    baker, beekeeper, bookbinder, botanist, carpenter, cartographer, clockmaker, dentist, geologist,
    glassblower, journalist, lighthouse keeper, locksmith, midwife, notary, potter, saddler, sculptor,
    shipwright, surveyor, tailor, translator, vet, weaver
    """
)
INSTRUMENTS = words(
    """
    accordion banjo bassoon cello clarinet flute guitar harp mandolin oboe organ piano trombone trumpet tuba
    violin
    """
)
PETS = words(
    """
    cat dog donkey goat hen parrot pony rabbit tortoise
    """
)
PET_NAMES = words(
    """
    Biscuit Button Captain Dumpling Fig Ginger Juniper Mustard Nutmeg Pepper Pickle Plum Rocket Truffle
    Waffle
    """
)
DISHES = phrases(
    """
    barley soup, cherry dumplings, fried mushrooms, leek pie, lentil stew, mussels in cider, onion tart,
    pickled herring, plum cake, potato pancakes, pumpkin risotto, roast duck, smoked trout, spinach noodles
    """
)
PRIZES = phrases(
    """
    Amber Quill, Blue Lantern Medal, Cedar Ribbon, Golden Compass, Harbour Cup, Iron Feather, Juniper Award,
    Marble Star, Northern Laurel, Silver Acorn, Velvet Anchor, White Heron Prize
    """
)
RIVERS = words(
    """
    Arden Belle Corve Dove Esker Fennel Garrow Hale Ilver Jory Kell Loden Mirrow Nairn Orrin Pellow Quill
    Rushen Sorrel Tamble Umber Varn Wendle Yewell
    """
)
GOODS = phrases(
    """
    blue pottery, brass clocks, carved pipes, cheese wrapped in nettles, copper bells, felt hats, hand-made
    paper, honey vinegar, lace curtains, leather saddles, painted sledges, pear brandy, roof slates, sea
    salt, silk ribbons, smoked eels, stained glass, walnut bread, willow baskets, wool blankets
    """
)
FESTIVALS = phrases(
    """
    a kite race, a lantern parade, a market of old books, a night of open bakeries, a regatta of rowing
    boats, a sheep fair, a snow sculpture contest, a torchlight run, an apple harvest dance, an open-air
    opera
    """
)
ARCHES = words(
    """
    three four five seven nine eleven twelve thirteen fifteen seventeen
    """
)
MONTHS = words(
    """
    January February March April May June July August September October November December
    """
)

# {Who} and {who} are the subject's name in a passage's first sentence and a pronoun (or "the town") after it.
PERSON = {
    "birthplace": [
        "{Who} was born in {birthplace} in {born} and spent a quiet childhood there.",
        "{Who} came into the world in {birthplace} in the winter of {born}, the youngest of three children.",
    ],
    "job": [
        "After school {who} trained for four years and became a {job}.",
        "{Who} earns a living as a {job} and has a small workshop behind the house.",
    ],
    "instrument": [
        "In the evenings {who} plays the {instrument} in a group of friends that meets above a bakery.",
        "{Who} learned the {instrument} as a child and still plays it at weddings.",
    ],
    "spouse": [
        "{Who} is married to {spouse}; they met on a delayed train.",
        "For many years {who} has been married to {spouse}, and the two share a house with a large garden.",
    ],
    "pet": [
        "{Who} keeps a {pet} called {pet_name}, who follows visitors to the gate.",
        "When {who} goes shopping, a {pet} called {pet_name} comes along and is greeted by everyone.",
    ],
    "dish": [
        "Asked for a favourite dish, {who} always names {dish}.",
        "On birthdays {who} cooks {dish}, a favourite dish since childhood.",
    ],
    "prize": [
        "In {prize_year} {who} was awarded the {prize} at a ceremony in the capital.",
        "{Who} won the {prize} in {prize_year} and keeps it on a kitchen shelf.",
    ],
}
PLACE = {
    "river": [
        "{Who} lies on the river {river}, surrounded by low hills.",
        "The river {river} runs through {who} and turns two old mills.",
    ],
    "founded": [
        "{Who} was founded in {founded} by families who had lost their homes to a flood.",
        "A handful of fishermen founded {who} in {founded}, at the end of a long war.",
    ],
    "known": [
        "{Who} is known far beyond the region for {known}, sold on the square every Saturday.",
        "Travellers know {who} for {known}, made in workshops along the old wall.",
    ],
    "mayor": [
        "The present mayor of {who} is {mayor}, who was elected by a margin of eleven votes.",
        "{mayor} is the mayor of {who} and walks to the town hall every morning.",
    ],
    "festival": [
        "Every {month} the people of {who} hold {festival}, and guests sleep in barns and boats.",
        "Once a year, in {month}, the people of {who} hold {festival}, for which the main street is closed.",
    ],
    "bridge": [
        "A stone bridge with {arches} arches links the two halves of {who}.",
        "The bridge of {who} has {arches} arches and was rebuilt twice.",
    ],
}
PERSON_FILLERS = [
    "Neighbours describe {him} as a patient listener who never leaves a letter unanswered.",
    "{He} rises before six and takes the same walk along the canal in any weather.",
    "For a while {he} thought of moving abroad, but the plan came to nothing.",
    "A local newspaper once printed a long portrait that {he} claims never to have read.",
    "{He} reads detective novels and guesses the culprit more often than not.",
    "Twice a year {he} visits an old teacher, and they talk about the weather and politics.",
    "{He} has never owned a car and repairs {his} bicycle without help.",
    "Friends say that {he} tells the same three jokes at every party.",
]
PLACE_FILLERS = [
    "The railway station has only one platform, and trains stop there five times a day.",
    "On clear days the mountains can be seen from the top of the water tower.",
    "A fire destroyed much of the old quarter, and the houses were rebuilt in brick.",
    "The school, the library and the post office share one long building.",
    "Young people leave for the cities, yet many return after some years.",
    "In dry summers the fields are watered from a canal that monks once dug.",
    "Two inns compete for guests, and each claims to be the older one.",
    "The streets are narrow, and deliveries are made by hand cart to this day.",
]

ASK_PERSON = {
    "birthplace": "In which town was {name} born?",
    "job": "What is the profession of {name}?",
    "instrument": "Which instrument does {name} play?",
    "spouse": "Who is {name} married to?",
    "pet": "What is the {pet} of {name} called?",
    "dish": "What is the favourite dish of {name}?",
    "prize": "Which prize did {name} win in {prize_year}?",
}
ASK_PLACE = {
    "river": "On which river does {name} lie?",
    "founded": "In which year was {name} founded?",
    "known": "What is {name} known for?",
    "mayor": "Who is the mayor of {name}?",
    "festival": "What do the people of {name} hold every {month}?",
    "bridge": "How many arches does the bridge of {name} have?",
}
ASK_BIRTHPLACE = {
    "river": "On which river does the town lie where {name} was born?",
    "founded": "In which year was the town founded where {name} was born?",
    "known": "What is the town known for where {name} was born?",
    "festival": "What is held every year in the town where {name} was born?",
}
ASK_MAYOR = {
    "job": "What is the profession of the mayor of {name}?",
    "instrument": "Which instrument does the mayor of {name} play?",
    "spouse": "Who is the mayor of {name} married to?",
    "dish": "What is the favourite dish of the mayor of {name}?",
}
ANSWER_FIELD = {"pet": "pet_name", "bridge": "arches"}
"""Fields that answer a fact, where they are not the fact's own name."""
