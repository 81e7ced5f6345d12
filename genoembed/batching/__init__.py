"""Which pieces share a forward pass, and how they are arranged: padded or packed."""
