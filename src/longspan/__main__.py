"""`python -m longspan` is the command `longspan`."""

if __name__ == "__main__":
    # Worker processes import this module too, under another name, and need no command line.
    from longspan.cli.main import run

    run()
