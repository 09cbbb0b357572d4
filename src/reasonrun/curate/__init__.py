"""Pure functions from rollouts to examples; the rows that reach a trainer all come from here."""
