"""``python -m genoembed`` is the command line."""

from genoembed.cli import main

if __name__ == "__main__":
    main(prog_name="genoembed")
