"""The durable steps behind ``Lab``'s verbs, one module per verb."""
