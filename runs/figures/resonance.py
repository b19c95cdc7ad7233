"""How much logits change after L tokens of a prompt that repeats (Theorem 5.4)."""

from figure import main

main("resonance", __doc__)
