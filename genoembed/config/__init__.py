"""Every option, described once: its type, bounds, unit, default and help, for Python, files and commands."""
