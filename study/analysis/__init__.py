"""What runs say of the report's claims: a table of runs, one number for each seed, and what may be read from it."""
