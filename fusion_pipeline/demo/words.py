"""Wording: phrases put together from word lists. No brands, no persons."""

from __future__ import annotations

from random import Random

SEASONS = ("Spring", "Summer", "Autumn", "Winter", "Harvest", "Midsummer", "Early", "Annual")
MANNERS = ("Open", "Little", "Grand", "Riverside", "Old Town", "Moonlight", "Family", "Harbour")
TOPICS = (
    "Garden", "Kite", "Book", "Jazz", "Bread", "Lantern", "Bicycle", "Pottery", "Orchid",
    "Chess", "Film", "Cheese", "Railway", "Folk Dance", "Apple", "Science", "Puppet", "Map",
)  # fmt: skip
EVENTS = ("Fair", "Festival", "Evening", "Market", "Weekend", "Workshop", "Show", "Exhibition")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
VENUES = (
    "Town Hall", "Old Mill", "Harbour Shed", "Station Square", "School Yard", "Glass House",
    "City Library", "Boat Club", "Castle Lawn", "Market Hall", "Lower Barn", "Tram Depot",
)  # fmt: skip
STREET_STEMS = (
    "Mill", "Church", "Station", "Orchard", "Bridge", "Harbour", "Chestnut", "Quarry", "Garden",
    "Meadow", "Foundry", "Willow", "Market", "Canal", "Lantern", "Abbey", "Juniper", "Tanner",
)  # fmt: skip
STREET_ENDS = ("Street", "Road", "Lane", "Avenue", "Square", "Hill", "Row", "Close")
PLACE_STEMS = (
    "North", "Stone", "Ash", "Wood", "Fern", "Marsh", "Black", "Long", "Elm", "Winter", "Red",
    "Fox", "Brook", "Clay", "Haver", "Linden",
)  # fmt: skip
PLACE_ENDS = ("ford", "wick", "bury", "field", "ham", "gate", "moor", "combe", "haven", "dale")
SUBJECTS = (
    "Water Network", "Bus Service", "School Kitchen", "Bridge Repair", "Forest Survey",
    "Heat Pumps", "Street Lighting", "Waste Sorting", "River Levels", "Solar Roofs",
    "Library Loans", "Bicycle Lanes", "Soil Health", "Harbour Traffic", "Bird Count",
)  # fmt: skip
ASPECTS = (
    "Where we stand", "Costs so far", "Next steps", "Main risks", "What we learned", "Open points",
    "Plan for the year", "Who does what", "Results at a glance", "Method", "Time line", "Findings",
)  # fmt: skip
VERBS = (
    "Reduce", "Measure", "Replace", "Extend", "Review", "Publish", "Inspect", "Compare", "Repair",
    "Test", "Document", "Schedule", "Train", "Order", "Map",
)  # fmt: skip
ADJECTIVES = (
    "old", "weekly", "broken", "spare", "shared", "regional", "missing", "larger", "seasonal",
    "quiet", "manual", "local", "remote", "daily", "unused",
)  # fmt: skip
THINGS = (
    "pumps", "sensors", "meters", "routes", "reports", "valves", "samples", "permits", "batteries",
    "drawings", "contracts", "filters", "forecasts", "shelters", "signals",
)  # fmt: skip
FLAVOURS = (
    "Blackberry", "Wild Cherry", "Lemon Balm", "Peppermint", "Chestnut", "Apricot", "Rosehip",
    "Lavender", "Ginger Pear", "Elderflower", "Sea Salt", "Heather", "Green Tomato", "Plum",
)  # fmt: skip
FOODS = (
    "Tomato soup", "Baked potato", "Lentil stew", "Rye bread", "Apple cake", "Mushroom pie",
    "Green salad", "Bean chili", "Fish soup", "Carrot rolls", "Oat porridge", "Onion tart",
    "Plum dumplings", "Cheese plate", "Barley risotto", "Hot cocoa", "Mint tea", "Filter coffee",
)  # fmt: skip
GOODS = (
    "Milk 1 l", "Brown bread", "Apples 1 kg", "Eggs x10", "Butter 250 g", "Carrots", "Rice 500 g",
    "Olive oil", "Tea bags", "Soap bar", "Light bulb", "Notebook", "Oat flakes", "Honey 340 g",
    "Batteries x4", "Matches", "Candles", "Paper bags", "Lemons x3", "Yeast",
)  # fmt: skip
HEADLINES = (
    "{place} opens a new {thing} near {street}",
    "Why {thing}s return to {place} every {season}",
    "{place} votes on the {street} {thing}",
    "A short guide to the {thing}s of {place}",
    "Heavy rain closes {street} for {number} days",
    "{number} volunteers rebuild the {place} {thing}",
)
LANDMARKS = ("footbridge", "market", "harbour", "orchard", "tram line", "library", "windmill")
SENTENCES = (
    "Work started in {month} and took {number} weeks.",
    "The council set aside {number} thousand for repairs.",
    "Visitors can walk there from {street} in {number} minutes.",
    "Most of the timber comes from {place}.",
    "A second part will follow in {month}.",
    "Local schools measured the water {number} times.",
    "The old stones were cleaned and used again.",
    "Trains between {place} and {other} run every {number} minutes.",
    "Nobody had counted the birds since {month}.",
    "Entry is free for children under {number}.",
    "The path is open from dawn to dusk.",
    "Please bring boots when it has rained.",
)


def place(rng: Random) -> str:
    return rng.choice(PLACE_STEMS) + rng.choice(PLACE_ENDS)


def street(rng: Random) -> str:
    return f"{rng.choice(STREET_STEMS)} {rng.choice(STREET_ENDS)}"


def event(rng: Random) -> str:
    first = rng.choice(SEASONS + MANNERS)
    return f"{first} {rng.choice(TOPICS)} {rng.choice(EVENTS)}"


def date(rng: Random) -> str:
    return f"{rng.choice(WEEKDAYS)} {rng.randint(1, 28)} {rng.choice(MONTHS)}"


def clock(rng: Random, first: int = 6, last: int = 22) -> str:
    return f"{rng.randint(first, last):02d}:{rng.choice((0, 10, 15, 20, 30, 40, 45, 50)):02d}"


def hours(rng: Random) -> str:
    return f"{clock(rng, 8, 12)} - {clock(rng, 15, 22)}"


def price(rng: Random, top: int = 20) -> str:
    return f"{rng.randint(1, top)}.{rng.choice((0, 20, 40, 50, 80, 90)):02d}"


def bullet(rng: Random) -> str:
    """A slide's bullet, such as "Replace old valves before March"."""
    start = f"{rng.choice(VERBS)} {rng.choice(ADJECTIVES)} {rng.choice(THINGS)}"
    end = rng.choice(
        (
            f"before {rng.choice(MONTHS)}",
            f"in {rng.randint(2, 40)} districts",
            f"by {rng.randint(3, 60)} percent",
            f"with {rng.choice(THINGS)}",
            f"near {place(rng)}",
        )
    )
    return f"{start} {end}"


def _filled(template: str, rng: Random) -> str:
    return template.format(
        place=place(rng),
        other=place(rng),
        street=street(rng),
        thing=rng.choice(LANDMARKS),
        season=rng.choice(("spring", "summer", "autumn", "winter")),
        month=rng.choice(MONTHS),
        number=rng.randint(3, 48),
    )


def headline(rng: Random) -> str:
    return _filled(rng.choice(HEADLINES), rng)


def sentences(rng: Random, count: int) -> str:
    return " ".join(_filled(s, rng) for s in rng.sample(SENTENCES, count))
