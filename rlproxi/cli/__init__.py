"""The command line: one module for each command. The only code, with rlproxi.api, that imports actors."""
