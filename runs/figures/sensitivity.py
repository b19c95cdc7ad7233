"""What is lost when one layer alone keeps few tokens, against 1 - S of the layer."""

from figure import main

main("sensitivity", __doc__)
