"""The comparison: its plan, its cells, and what runs them."""
