"""Phrases that are remembered: runs of tokens that the model produced before, or that documents hold.

`base` is the protocol of a pool, `memory` the pool in memory, `suffix_index` the search for what followed the same
tokens, `corpus` and `documents` texts that answers may quote.
"""
