"""Layers that three families or more share."""
