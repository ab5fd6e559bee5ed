"""Plain words that generated tasks build keys and names from."""


def words(text: str) -> list[str]:
    """The words of a text.

    >>> words("oak ash")
    ['oak', 'ash']
    """
    return text.split()


def phrases(text: str) -> list[str]:
    """The comma-separated phrases of a text.

    >>> phrases("a kite race, a regatta")
    ['a kite race', 'a regatta']
    """
    return [" ".join(phrase.split()) for phrase in text.split(",")]


ADJECTIVES = words(
    """
    amber ancient autumn brave bright broken calm clever copper coral crimson curious dapper distant dusty
    eager early emerald faithful fearless foggy frosty gentle gilded golden grand hidden hollow honest
    humble icy ivory jolly kind lively lonely lucky marble merry misty modest narrow nimble northern olive
    patient polished proud purple quiet rapid restless royal rusty scarlet secret silent silver simple
    sleepy slender solemn southern stormy sturdy sunny swift tender timber velvet violet wandering western
    winter witty wooden young
    """
)

NOUNS = words(
    """
    anchor apple arrow badger barley basket beacon beaver bell birch blanket bridge bucket candle canyon
    carpet castle cedar chapel clock cloud comet compass copper cricket crown desert dolphin drum eagle
    ember engine falcon feather fiddle forest fountain garden gate glacier hammer harbor hawk helmet heron
    island jacket kettle ladder lantern lemon lily lizard magnet maple meadow mirror moon mountain needle
    oak ocean orchard otter owl paddle parrot pebble pepper piano pigeon pillow pine planet plum rabbit
    raven ribbon river rocket saddle salmon sparrow spoon squirrel star stone table thunder tiger tower
    trumpet tulip tunnel turtle valley violin wagon walnut whistle willow window wolf
    """
)
