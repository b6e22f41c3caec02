-- At a fixed rate, whether it is answered or not: latency counts from when a request was due, so
-- that waiting for a free connection, or for wrk itself (it sleeps in whole milliseconds), counts.
-- One connection a thread, as only then request() and response() take turns.
-- Arguments: the file of bodies, their encoding or "", requests a second, connections.
local bodies = require("bodies")
local ffi = require("ffi")
ffi.cdef [[
  struct bench_time { long s, ns; };
  int clock_gettime(int clock, struct bench_time *now);
]]
local MONOTONIC, BUCKET_US = 1, 50
local clock = ffi.new("struct bench_time")
local threads, requests, at = {}, {}, 0
local period_us, offset_us, due, began
number, taken = 0, {}

local function now_us()
  ffi.C.clock_gettime(MONOTONIC, clock)
  return tonumber(clock.s) * 1e6 + tonumber(clock.ns) / 1e3
end

function setup(thread)
  thread:set("number", #threads)
  threads[#threads + 1] = thread
end

function init(args)
  requests = bodies.requests(args[1], args[2])
  period_us = args[4] / args[3] * 1e6
  offset_us = number * period_us / args[4]
  at = number * 7919 -- threads begin at different bodies
end

function delay()
  due = due and due + period_us or now_us() + offset_us
  return math.max(0, math.ceil((due - now_us()) / 1e3))
end

function request()
  if due then began = math.min(due, now_us()) end -- a little early; not due: wrk looks at it once
  at = at % #requests + 1
  return requests[at]
end

function response()
  local bucket = math.floor((now_us() - began) / BUCKET_US)
  taken[bucket] = (taken[bucket] or 0) + 1
end

function done(summary)
  local all, count, most = {}, 0, 0
  for _, thread in ipairs(threads) do
    for bucket, times in pairs(thread:get("taken")) do
      all[bucket] = (all[bucket] or 0) + times
      count, most = count + times, math.max(most, bucket)
    end
  end
  local function percentile_ms(share)
    local left = share * count
    for bucket = 0, most do
      left = left - (all[bucket] or 0)
      if left <= 0 then return (bucket + 1) * BUCKET_US / 1e3 end
    end
    return 0
  end
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "errors": %d, "p50_ms": %f, "p99_ms": %f, "max_ms": %f}\n',
    summary.requests, summary.duration / 1e6, bodies.errors(summary),
    percentile_ms(0.5), percentile_ms(0.99), (most + 1) * BUCKET_US / 1e3))
end
