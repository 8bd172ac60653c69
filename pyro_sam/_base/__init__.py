"""What everything else stands on: random streams, buffers, ranks, vectorised runs, checks of arguments."""
