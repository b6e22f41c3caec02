-- As fast as it is answered: each connection sends its next request when it has its answer.
-- Arguments: the file of bodies, their encoding or "".
local bodies = require("bodies")
local requests, at = {}, 0

function init(args)
  requests = bodies.requests(args[1], args[2])
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency)
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "errors": %d, "p50_ms": %f, "p99_ms": %f}\n',
    summary.requests, summary.duration / 1e6, bodies.errors(summary),
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
