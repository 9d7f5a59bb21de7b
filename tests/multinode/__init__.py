"""Several hosts on one machine: `hosts` makes them, `jobs` trains on them, `matrix` and `faults` are long runs."""
