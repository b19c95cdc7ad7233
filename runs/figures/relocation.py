"""Dominant channels moved: predicted and measured spacing of diagonals (Theorem 5.3)."""

from figure import main

main("relocation", __doc__)
