"""Quality against the bytes really held, of every results.json below --results."""

from figure import main

main("memory", __doc__)
