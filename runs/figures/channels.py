"""How often each RoPE channel dominates a head, and how much of the energy it then holds."""

from figure import main

main("channels", __doc__)
