"""Entry points, each run as `python -m jobs.NAME`: arguments, logging and exit codes around the library."""
