"""How much attention persists after a shift, and how much the query model expects."""

from figure import main

main("persistence", __doc__)
