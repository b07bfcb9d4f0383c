"""The command `spot`: one file per subcommand."""
