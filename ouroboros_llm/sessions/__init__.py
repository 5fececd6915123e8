"""The prefix cache: KV caches kept between the requests of a scope.

`prefix_cache` holds them within a byte budget, with LRU eviction; `session` is what belongs to a scope beside them;
`snapshot` writes them to files; `device_memory` checks that an answer fits.
"""
