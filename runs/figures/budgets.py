"""Tokens that each method keeps in every layer."""

from figure import main

main("budgets", __doc__)
