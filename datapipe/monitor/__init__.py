"""What the service shows of itself: reads the books, changes nothing."""
