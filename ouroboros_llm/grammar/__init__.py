"""Grammar-constrained decoding on llguidance.

`base` is what users hold, `compiled` a grammar over a tokenizer, `state` where a text stands in it, `completion` a
short way to its end, `constraint` what the sampler asks.
"""
