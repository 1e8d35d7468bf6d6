"""Speed and memory side by side: python -m bench."""

import argparse
import sys


def parser():
    """An argparse parser for the file that runs as `python -m bench...`; its docstring is the help.

    A file asks it before the imports that take seconds, so that --help and mistyped flags are answered at once."""
    main = sys.modules['__main__']
    how = argparse.RawDescriptionHelpFormatter
    name = f'python -m {main.__spec__.name.removesuffix(".__main__")}'
    return argparse.ArgumentParser(name, description=main.__doc__, formatter_class=how, allow_abbrev=False)
