"""What a coded cache costs in picture quality, measured in closed loop for many codecs at once.

`loop` generates videos from caches coded by any `codecs.SpanCodec`; `frontier` runs the rows of `rows` and judges them.
"""
