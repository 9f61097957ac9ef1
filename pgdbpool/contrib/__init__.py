"""What fits the pools into other people's programs; nothing of the core imports it."""
