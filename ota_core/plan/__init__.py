"""Everything a merge reads, opened and checked; and what must be known of it before the first block."""
