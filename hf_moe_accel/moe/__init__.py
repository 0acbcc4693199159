"""THE TOKEN PATH: where the stations meet."""
