"""The little world of the demo: its facts and its words.

The generator writes dialogues from it, and the rule judges answers by it; they share nothing else.
It is small on purpose: a byte-level BPE of 512 entries holds every word of the data as one token.
"""

from __future__ import annotations

import itertools

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Leo", "Maria")

COLOUR_OF = {
    "lemon": "yellow",
    "tomato": "red",
    "snow": "white",
    "coal": "black",
    "grass": "green",
    "banana": "yellow",
    "cherry": "red",
    "paper": "white",
    "night": "black",
    "leaf": "green",
}

_OPPOSITES = (("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("light", "dark"), ("wet", "dry"))
OPPOSITE_OF = dict(_OPPOSITES) | {right: left for left, right in _OPPOSITES}

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
NUMBER_AFTER = dict(itertools.pairwise(_NUMBERS))

ITEMS = ("apples", "bread", "cheese", "eggs", "flour", "honey", "jam", "milk", "nuts", "pears", "rice", "tea")

MOMENTS = ("morning", "afternoon", "evening")

# A good answer is `OPENER[, user]. CONTENT. CLOSER.`. Contents differ in length, by task. Openers
# and closers hardly do: a reward model scores a long closer higher, and PPO then spends its KL on
# closers (closers of 2 to 7 tokens: KL 3.0, 84 % good; these: KL 1.6, 89 %; one seed, before the
# pairs were mended).
OPENERS = ("Sure", "Gladly", "Certainly", "Of course", "With pleasure")
CLOSERS = ("All the best.", "You are welcome.", "I hope this helps.", "Have a nice day.", "Please ask me again.")

RUDE = ("What a silly question.", "Leave me alone.", "Find it out yourself.", "You are boring.", "I do not care.")
