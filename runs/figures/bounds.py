"""How tight the bounds of the theorems are, of every verification.json below --results."""

from figure import main

main("bounds", __doc__)
