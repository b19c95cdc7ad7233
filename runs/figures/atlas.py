"""The observed label of every head."""

from figure import main

main("atlas", __doc__)
