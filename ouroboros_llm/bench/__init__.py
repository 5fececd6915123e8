"""Side-by-side measurements and their reports: `ouroboros bench --help`."""
