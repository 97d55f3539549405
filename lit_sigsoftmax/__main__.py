"""``python -m lit_sigsoftmax``, the same as the console script."""

from lit_sigsoftmax.cli import main

if __name__ == "__main__":
    main()
