"""`qvg-paged bench`: speed of attention, encoding, decoding and the manager beside the systems they compete with."""
