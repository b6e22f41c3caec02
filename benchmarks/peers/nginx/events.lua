-- POST /: checks events and sends them to rsyslog. What arrives within GATHER_S leaves as one message,
-- a JSON array, framed by its length.
local cjson = require "cjson"

local ANSWER = '{"status_code": 0, "status_message": "ok"}'
local FULL = 1024 * 1024 -- bytes: then the next message begins
local MAX_WAITING = 64 * FULL
local GATHER_S = 0.01
local PATIENCE_S = 20
-- messages that wait; the last one still grows
local messages, waiting, sending = {}, 0, false

local events = {}

local function send(text)
  local socket = ngx.socket.tcp()
  local ok, err = socket:connect("unix:rows")
  if not ok then return nil, err end
  ok, err = socket:send({#text, " ", text})
  if not ok then return nil, err end
  return socket:setkeepalive()
end

-- Sends until nothing waits; what can't be sent waits for the next second.
local function flush()
  while #messages > 0 do
    local rows = table.remove(messages, 1)
    local ok, err = send("[" .. table.concat(rows, ",") .. "]")
    if not ok then
      ngx.log(ngx.ERR, "rsyslog: ", err)
      table.insert(messages, 1, rows)
      sending = not ngx.worker.exiting() and ngx.timer.at(1, flush)
      return
    end
    waiting = waiting - rows.bytes
  end
  sending = false
end

local function add(text)
  local rows = messages[#messages]
  if not rows or rows.bytes > FULL then
    rows = { bytes = 0 }
    messages[#messages + 1] = rows
  end
  rows[#rows + 1] = text
  rows.bytes = rows.bytes + #text
  waiting = waiting + #text
  if not sending then sending = ngx.timer.at(GATHER_S, flush) end
end

-- Waits for room; false: there is none.
local function room()
  local until_s = ngx.now() + PATIENCE_S
  while waiting > MAX_WAITING do
    if ngx.now() > until_s then return false end
    ngx.sleep(GATHER_S)
  end
  return true
end

local function whole(number)
  return type(number) == "number" and number % 1 == 0 and number > -2^53 and number < 2^53
end

-- The row of an event as JSON, or nil.
local function row(event)
  if type(event) ~= "table" or event.event_name ~= "crash_report" then return nil end
  local message = event.message
  if not whole(event.user_id) or not whole(event.timestamp) then return nil end
  if type(message) ~= "string" or string.find(message, "\0", 1, true) then return nil end
  return string.format('{"user_id":%.0f,"timestamp":%.0f,"message":%s}',
    event.user_id, event.timestamp, cjson.encode(message))
end

-- The rows of a body, or nil.
local function checked(body)
  if not body or not ngx.re.find(body, "", "uo") then return nil end -- "u": is it UTF-8?
  local ok, event = pcall(cjson.decode, body)
  if not ok or type(event) ~= "table" then return nil end
  if event[1] == nil then return row(event) end
  local found = {}
  for i = 1, #event do
    found[i] = row(event[i])
    if not found[i] then return nil end
  end
  return table.concat(found, ",")
end

local function answer(status, text)
  ngx.status = status
  ngx.header.content_length = #text
  ngx.print(text)
end

function events.take()
  ngx.req.read_body()
  local text = checked(ngx.req.get_body_data())
  if not text then return answer(400, '{"status_code": 3, "status_message": "no crash_report"}') end
  if not room() then return answer(503, '{"status_code": 9, "status_message": "full"}') end
  add(text)
  answer(200, ANSWER)
end

function events.listening()
  local file = io.open(ngx.config.prefix() .. "/address")
  io.stdout:write('{"event": "listening", "address": "', file:read("*l"), '"}\n')
  io.stdout:flush()
  file:close()
end

return events
