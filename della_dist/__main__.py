"""``python -m della_dist``."""

from della_dist.cli import main

if __name__ == "__main__":
    main(prog_name="della-dist")
