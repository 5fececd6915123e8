"""The algorithm: speculative decoding with draft trees, lossless.

`decoder` is the loop (draft, verify, accept) on one screen; `verification` the one accept rule; `draft_tree` what is
verified; `sampling` how the target model chooses; `drafter` and `target` the two protocols that the loop runs on.
The method is Ouroboros (arXiv 2402.13720).
"""
