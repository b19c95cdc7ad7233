"""Quality against budget with 95% intervals, of every results.json below --results."""

from figure import main

main("quality", __doc__)
