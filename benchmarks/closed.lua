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

done = bodies.done
