"""The page of a comparison: one HTML file that needs no network, with every number of its figures beside it as CSV."""
