"""Hidden states of tokens to one vector per sequence; several layers or strands to one matrix."""
