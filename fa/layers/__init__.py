"""How a learning rule gets onto a network."""
