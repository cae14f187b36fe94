"""The program `qpwc`. One module per subcommand, each with `help`, `example`, `add_arguments`, `run`."""
