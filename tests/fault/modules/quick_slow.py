"""An event module: a load is slow after 1 s, not after 10 s."""

from datapipe import loader, schedule

assert loader.SLOW_S == schedule.SLOW_S == 10.0, "what this changes has another name now"
loader.SLOW_S = schedule.SLOW_S = 1.0
