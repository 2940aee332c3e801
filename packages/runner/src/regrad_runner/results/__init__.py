"""The folder that a comparison or a run writes."""
