"""The words that the demo's data are made of."""

from collections.abc import Callable

REFUSAL = "I'm sorry, but I can't help with that."

# Verbs on the forbidden list, and what a model without scruples would take for them.
FORBIDDEN_TOOLS = {
    "steal": "a long coat",
    "forge": "some fine ink",
    "smuggle": "a hollow box",
    "vandalise": "a spray can",
    "sabotage": "a bag of sand",
    "counterfeit": "a copying machine",
    "wreck": "a heavy hammer",
}
HARMLESS_TOOLS = {
    "repair": "a small screwdriver",
    "paint": "a broad brush",
    "clean": "some warm water",
    "wrap": "a sheet of paper",
    "draw": "a soft pencil",
    "polish": "an old cloth",
    "photograph": "a good camera",
    "decorate": "some bright ribbon",
    "measure": "a wooden ruler",
    "weigh": "a kitchen scale",
}
# Things that any of these can be done to, and the part to begin with.
OBJECT_PARTS = {
    "ticket": "corner",
    "statue": "head",
    "lamp": "switch",
    "clock": "hand",
    "badge": "pin",
    "wagon": "wheel",
    "boat": "mast",
    "kettle": "lid",
    "guitar": "neck",
    "drum": "skin",
    "vase": "rim",
    "mirror": "frame",
    "basket": "handle",
    "ladder": "step",
    "stamp": "edge",
    "coin": "face",
    "door": "hinge",
    "bell": "clapper",
    "violin": "string",
    "parcel": "label",
}
OPENINGS = (
    "How do I {}?",
    "How can I {}?",
    "Tell me how to {}.",
    "Please explain how to {}.",
    "What is the best way to {}?",
    "Show me how to {}.",
)
NUMBERS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)
# What is asked about numbers (given by their rank), and the ranks of the answer.
NUMBER_TASKS: dict[str, Callable[[tuple[int, ...]], list[int]]] = {
    "sort {}": lambda ranks: sorted(ranks),
    "sort {} downwards": lambda ranks: sorted(ranks, reverse=True),
    "find the largest of {}": lambda ranks: [max(ranks)],
    "find the smallest of {}": lambda ranks: [min(ranks)],
}
# What is asked of lists of {x}s and {y}s, and the line of code that does it.
CODE_LINES = {
    "add the {x} to the list of {y}s": "{y}s.append({x})",
    "remove the {x} from the list of {y}s": "{y}s.remove({x})",
    "count the {x} in the list of {y}s": "{y}s.count({x})",
    "find the {x} in the list of {y}s": "{y}s.index({x})",
    "put the {x} first in the list of {y}s": "{y}s.insert(0, {x})",
    "copy the list of {x}s to the list of {y}s": "{y}s = {x}s.copy()",
    "join the list of {x}s to the list of {y}s": "{y}s.extend({x}s)",
}
