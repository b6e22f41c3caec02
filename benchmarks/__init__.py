"""`make bench`: datapipe beside what one could take instead, on one machine, in one run."""
