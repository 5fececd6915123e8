"""Side-by-side measurements: `python -m ouroboros_llm.bench --help`."""
