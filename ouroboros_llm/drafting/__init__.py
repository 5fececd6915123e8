"""Drafters: implementations of `decoding.drafter.Drafter`.

`tree_drafter` grows one draft tree out of what its sources propose (phrases, the cached answer of a prompt, token
recycling, documents, a draft model, forced tokens of a grammar, lookahead), by calibrated probability and as wide as
pays by measured latency.
"""
