"""Take embeddings and models to other tools: files in their containers, folders in their layout."""
