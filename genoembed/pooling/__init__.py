"""Hidden states of tokens to one vector a sequence; several layers or strands to one matrix."""
