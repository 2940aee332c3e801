"""Installed plugins: listed, shown, checked, made."""
