"""Several hosts on one machine: `hosts` makes them, `jobs` starts training on them, `matrix` and `faults` are long runs."""
