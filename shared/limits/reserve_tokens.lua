-- Tokens of one minute: reserve an amount, all or nothing. A refusal writes nothing.
--
-- KEYS 1 state (string)   ARGV 1 quota   2 amount
-- Answer {1 reserved | 0 refused, remaining, reset, wait, entry's number, entry's time}
--        reset: µs until the window gives something back; wait: µs until this amount fits, 0 where it does now.
--
-- State: header, then a ring of `cap` entries (time u56, µs since 1970; amount u40): the entry with number i stands in
-- slot i % cap. The window is (now - W, now]: entries `tail` to `n` - 1, whose amounts make `sum`. The ring doubles when
-- it is full, and is begun anew when the window was empty.

local VERSION, HEADER, ENTRY, FORMAT = 1, 31, 12, '>I1I6I6I4I7I7'
local WINDOW, CAP_MIN, CAP_MAX = 60000000, 8, 65536

local state, quota, amount = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local real = tonumber(time[1]) * 1000000 + tonumber(time[2])

local n, tail, cap, sum, last = 0, 0, 0, 0, 0
local header = redis.call('GETRANGE', state, 0, HEADER - 1)
if #header == HEADER and header:byte(1) == VERSION then
  local _
  _, n, tail, cap, sum, last = struct.unpack(FORMAT, header)
  if cap < 1 or cap > CAP_MAX or n - tail > cap then n, tail, cap, sum, last = 0, 0, 0, 0, 0 end -- damaged
end
local now = math.max(real, last) -- a clock that went back stands still here

local function entry(i)
  local at = HEADER + (i % cap) * ENTRY
  return struct.unpack('>I7I5', redis.call('GETRANGE', state, at, at + ENTRY - 1))
end

if last <= now - WINDOW then tail, sum = n, 0 end
local oldest = now
while tail < n do
  local at, held = entry(tail)
  oldest = at
  if at > now - WINDOW then break end
  sum, tail = sum - held, tail + 1
end
if tail == n then sum, oldest = 0, now end

local wait = 0
if amount > quota then
  wait = WINDOW
elseif sum + amount > quota then
  local excess, i, at, held = sum + amount - quota, tail, now, 0
  while excess > 0 and i < n do
    at, held = entry(i)
    excess, i = excess - held, i + 1
  end
  wait = at + WINDOW - real
elseif n - tail >= CAP_MAX then
  wait = oldest + WINDOW - real
end
if wait > 0 or amount == 0 then
  return { wait > 0 and 0 or 1, math.max(quota - sum, 0), oldest + WINDOW - real, wait, 0, 0 }
end

if tail == n or n - tail == cap then
  local ring, longer = '', CAP_MIN
  if tail < n then -- moved so that every entry stands in its slot of the longer ring
    longer = cap * 2
    local slots = {}
    for i = tail, n - 1 do
      local at = HEADER + (i % cap) * ENTRY
      slots[i % longer + 1] = redis.call('GETRANGE', state, at, at + ENTRY - 1)
    end
    for i = 1, longer do slots[i] = slots[i] or string.rep('\0', ENTRY) end
    ring = table.concat(slots)
  end
  cap = longer
  redis.call('SET', state, string.rep('\0', HEADER) .. ring)
end
redis.call('SETRANGE', state, HEADER + (n % cap) * ENTRY, struct.pack('>I7I5', now, amount))
redis.call('SETRANGE', state, 0, struct.pack(FORMAT, VERSION, n + 1, tail, cap, sum + amount, now))
redis.call('PEXPIRE', state, math.ceil((now - real + WINDOW) / 1000) + 1000)
return { 1, quota - sum - amount, oldest + WINDOW - real, 0, n, now }
