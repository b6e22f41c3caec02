-- Requests are made once and then sent in turn: no string is put together while it is measured.
-- A file of bodies: for each its length, a line feed, its bytes.
local bodies = {}

function bodies.requests(path, encoding)
  local file, requests = assert(io.open(path, "rb")), {}
  local headers = encoding ~= "" and { ["Content-Encoding"] = encoding } or nil
  while true do
    local length = file:read("*n")
    if not length then break end
    file:read(1)
    requests[#requests + 1] = wrk.format("POST", nil, headers, file:read(length))
  end
  file:close()
  return requests
end

function bodies.errors(summary)
  local e = summary.errors
  return e.connect + e.read + e.write + e.status + e.timeout
end

function bodies.done(summary, latency)
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "errors": %d, "p50_ms": %f, "p99_ms": %f}\n',
    summary.requests, summary.duration / 1e6, bodies.errors(summary),
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end

return bodies
