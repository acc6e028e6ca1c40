"""Options of a command that needs no recipe."""

import argparse
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """Its errors are exceptions of ours, which the command line turns into one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ValueError(f"`{self.prog}`: {message}")
