"""Paged 2-bit KV cache for autoregressive video generation."""
