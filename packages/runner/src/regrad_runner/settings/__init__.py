"""Settings of a comparison or a run: read, checked, continued."""
