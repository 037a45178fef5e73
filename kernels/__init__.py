"""Encode, decode, paged attention: tensors in, tensors out."""
