"""The target model over transformers: implementations of `decoding.target.TargetModel`.

`eager` runs the library's own forward, `recurrent` models that are run one token a pass, `static/` passes of fixed
shape with CUDA graphs; `kv_cache` rewinds, `capabilities` probes what a model verifies, `latency` measures its passes,
`batching` makes passes of several texts in one.
"""
