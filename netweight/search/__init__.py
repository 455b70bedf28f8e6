"""Methods that look for a network: its layers, and the bits of each of their parts."""
