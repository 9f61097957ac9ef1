"""Integrations of the pools with other programs; nothing in the core imports them."""
