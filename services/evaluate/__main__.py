"""``python -m services.evaluate --model M --data D --out report/``; see ``--help``."""

from services.evaluate.cli import main

if __name__ == "__main__":
    main()
