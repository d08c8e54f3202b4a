"""Hyena layers in programs with UNets of their own. Each file is for one, and imports it in functions only."""
