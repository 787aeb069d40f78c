"""The command line, configuration from the environment, and the local launcher."""
