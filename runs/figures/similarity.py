"""q- and k-similarity by layer: means and ranges over heads."""

from figure import main

main("similarity", __doc__)
