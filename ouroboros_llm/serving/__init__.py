"""Serving many requests with one model.

`scheduler` runs the steps of active requests in turn (continuous batching where it pays), `request` is one of them,
`stream` the caller's side for threads and event loops, `fork_safety` what threads do when a process forks or exits.
"""
