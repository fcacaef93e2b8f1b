"""Side-by-side timing. The parent (drive, points, stats, table) is free of torch; the child times."""
