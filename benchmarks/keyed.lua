-- As closed.lua, with an Idempotency-Key of its own in each request, which has to be put together
-- then. Without keys it is put together as well: the generator costs the same.
-- Arguments: the file of bodies, their encoding or "", the first 24 characters of all keys, "yes"
-- or "".
local bodies = require("bodies")
local heads, tails, at, number = {}, {}, 0, 0
local prefix, keys
line = ""

function init(args)
  for i, request in ipairs(bodies.requests(args[1], args[2])) do
    local _, ended = request:find("\r\n\r\n", 1, true)
    heads[i], tails[i] = request:sub(1, ended - 2), request:sub(ended - 1)
  end
  prefix, keys = "Idempotency-Key: " .. args[3], args[4] == "yes"
end

function request()
  at, number = at % #heads + 1, number + 1
  line = prefix .. string.format("%012d", number) .. "\r\n"
  return heads[at] .. (keys and line or "") .. tails[at]
end

done = bodies.done
