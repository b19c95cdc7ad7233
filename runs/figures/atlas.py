"""A statistic of every head: what attention spends on the first tokens."""

from figure import main

main("atlas", __doc__)
