"""`datapipe send`: files of events to a service's URL, none lost, none twice."""
