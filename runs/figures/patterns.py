"""The clearest head of every label: attention map, and mean logit by distance."""

from figure import main

main("patterns", __doc__)
