"""The command line: it reads arguments, calls one public function of a room and prints the result.

A room is imported inside the command that needs it, so `longspan --help` starts at once and works with
half of the packages missing. Results go to stdout, everything else to stderr.
"""
