"""A synthetic world in which it is known which (instruction, response) pair is truly aligned.

MAIN in miniature: invented places have six attributes each, seed pairs ask for and state facts
about one half of the places, unlabelled "web" responses tell (well or badly) of the other half, and
questions about that other half measure what was learnt. Nothing is downloaded, everything follows
from one integer, and because the generator knows every fact, each claim about the method can be
checked by exact judges instead of a model.

* `grammar`: the words, the templates, and the inverse grammar that reads facts back from text
* `generate`: seed pairs, unlabelled responses, test questions, pre-training documents, the truth
* `judge`: true pair, exact match, reverse correctness
* `vocabulary`: the lossless word-level tokenizer

The whole world is this project's own ("ours"); it is no part of the MAIN paper (arXiv 2504.12913).
"""

WORLD_POSITIONS = 256
"""Positions of the world's model, in tokens."""
