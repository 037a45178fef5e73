"""Kernels for direct reads that have yet to prove themselves on a GPU; `direct_reads.py` checks and times them."""
