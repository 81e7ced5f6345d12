"""Which pieces share a forward pass, and how they are laid out: padded or packed."""
