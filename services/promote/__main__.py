"""``python -m services.promote [--dry-run | --rollback | --history]``; see ``--help``."""

from services.promote.cli import main

if __name__ == "__main__":
    main()
