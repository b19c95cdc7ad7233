"""What the paper observed, with bootstrap intervals, of every verification.json."""

from figure import main

main("observations", __doc__)
