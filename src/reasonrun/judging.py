"""How well a judge's decisions agree with gold ones. Pure functions."""
