"""Run work units: cut, batch, embed, in this process."""
