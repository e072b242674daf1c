"""How a result is saved: in a folder, and on the hub."""
