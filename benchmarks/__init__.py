"""`make bench`: datapipe beside what it could be measured by, as ratios of one run."""
