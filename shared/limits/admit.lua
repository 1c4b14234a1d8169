-- One admission: the key's version, three windows, concurrent requests. All or nothing: a refusal writes nothing.
--
-- KEYS  1 state (string)   2 leases (sorted set)   3 the key's version (only when ARGV[8] is not empty)
-- ARGV  1 weight   2 per minute   3 per hour   4 per day   5 concurrency (0: none)   6 lease id   7 lease ttl, ms
--       8 the version that the caller knows ('' to skip)
-- Answer {1 admitted | 0 refused | -1 other version, active leases, then for minute, hour, day: remaining, reset, wait}
--       reset: µs until the window gives something back; wait: µs until this request fits, 0 where it does now.
--
-- State: header, 289 five-minute cells of the day (u32), then a ring of the last `cap` times (u56, µs since 1970):
-- entry i stands in slot i % cap. Minute and hour are exact: an entry at t counts in (now - W, now]. The day counts
-- the oldest of its cells whole, so it can only be stricter than the truth. The newest cell's count is in the header
-- and moves to its slot when the next cell begins. Weight 0 looks and records nothing.

local VERSION, HEADER, CELLS, ENTRY = 2, 46, 289, 7
local RING = HEADER + CELLS * 4
local MINUTE, HOUR, DAY, CELL = 60000000, 3600000000, 86400000000, 300000000
local FORMAT = '>I1I6I7I4I6I6I6I6I4'

local state, leases = KEYS[1], KEYS[2]
local weight, quotas, day_quota = tonumber(ARGV[1]), { tonumber(ARGV[2]), tonumber(ARGV[3]) }, tonumber(ARGV[4])
local concurrency = tonumber(ARGV[5])

if ARGV[8] ~= '' and redis.call('GET', KEYS[3]) ~= ARGV[8] then return { -1 } end

local time = redis.call('TIME')
local real = tonumber(time[1]) * 1000000 + tonumber(time[2])

-- Read.
local n, last, cap, tails, day_count, day_tail, newest_count = 0, 0, 0, { 0, 0 }, 0, 0, 0
local header = redis.call('GETRANGE', state, 0, HEADER - 1)
if #header == HEADER and header:byte(1) == VERSION then
  local _
  _, n, last, cap, tails[1], tails[2], day_count, day_tail, newest_count = struct.unpack(FORMAT, header)
end
local now = math.max(real, last) -- a clock that went back stands still here
local present = math.floor(now / CELL)
local newest = n > 0 and math.floor(last / CELL) or present

local function entry(i)
  local at = RING + (i % cap) * ENTRY
  return (struct.unpack('>I7', redis.call('GETRANGE', state, at, at + ENTRY - 1)))
end

local cells -- the slots of all cells, read when one is asked for
local function slot(i)
  if not cells then
    cells = n > 0 and redis.call('GETRANGE', state, HEADER, RING - 1) or string.rep('\0', CELLS * 4)
  end
  return (struct.unpack('>I4', cells, (i % CELLS) * 4 + 1))
end
local function cell(i)
  if i == newest then return newest_count end
  return i < newest and slot(i) or 0 -- what stands in a later cell's slot is left from an earlier round
end

-- The first entry from `low` on that is later than `limit`, and its time; n when there is none. Steps that double,
-- then halves.
local function first_after(limit, low)
  local step = 1
  while low < n do
    local high = math.min(low + step, n) - 1
    local at = entry(high)
    if at > limit then
      while low < high do
        local middle = math.floor((low + high) / 2)
        local between = entry(middle)
        if between > limit then high, at = middle, between else low = middle + 1 end
      end
      return low, at
    end
    low, step = high + 1, step * 2
  end
  return n, now
end

-- The exact windows.
local answer, fits = { 0, 0 }, true
local windows = { MINUTE, HOUR }
for k = 1, 2 do
  local window, quota = windows[k], quotas[k]
  local first = now
  if last <= now - window then
    tails[k] = n
  else
    tails[k], first = first_after(now - window, math.max(tails[k], n - cap))
  end
  local used, wait = n - tails[k], 0
  if weight > quota then
    wait = window
  elseif weight > 0 and used + weight > quota then
    wait = entry(n + weight - quota - 1) + window - real
  end
  if wait > 0 then fits = false end
  answer[k * 3] = quota - used
  answer[k * 3 + 1] = first + window - real
  answer[k * 3 + 2] = wait
end

-- The day. Every loop ends whatever the state says: a script that does not would stop Redis for everybody.
local oldest = present - CELLS + 1
if present ~= newest then
  day_tail = math.max(day_tail, newest - CELLS + 1)
  while day_tail < math.min(oldest, newest + 1) do
    day_count, day_tail = day_count - cell(day_tail), day_tail + 1
  end
  if oldest > newest then day_count = 0 end
  day_tail = day_count > 0 and math.max(day_tail, oldest) or present
  while day_tail < present and cell(day_tail) == 0 do day_tail = day_tail + 1 end
elseif n == 0 then
  day_tail = present
end
local wait = 0
if weight > day_quota then
  wait = DAY
elseif weight > 0 and day_count + weight > day_quota then
  local excess, i = day_count + weight - day_quota, math.max(day_tail, oldest)
  while i < present and excess > cell(i) do excess, i = excess - cell(i), i + 1 end
  wait = (i + CELLS) * CELL - real
end
if wait > 0 then fits = false end
answer[9], answer[10], answer[11] = day_quota - day_count, (day_tail + CELLS) * CELL - real, wait

if concurrency > 0 and weight > 0 then
  local active = redis.call('ZCOUNT', leases, '(' .. string.format('%.0f', real), '+inf')
  answer[2] = active
  if active >= concurrency then fits = false end
end

if fits then answer[1] = 1 end
if not fits or weight == 0 then
  for k = 3, 9, 3 do answer[k] = math.max(answer[k], 0) end
  return answer
end

-- Write. A ring of the wrong length is rebuilt; it shrinks only when the hour in it fits into the shorter one.
local fresh = n == 0
local needed = math.max(quotas[1], quotas[2])
if cap < needed or (cap > needed and n - tails[2] <= needed) then
  local keep = math.min(n, cap, needed)
  local ring = ''
  if keep > 0 then
    local from = (n - keep) % cap
    local straight = math.min(keep, cap - from)
    ring = redis.call('GETRANGE', state, RING + from * ENTRY, RING + (from + straight) * ENTRY - 1)
    if keep > straight then
      ring = ring .. redis.call('GETRANGE', state, RING, RING + (keep - straight) * ENTRY - 1)
    end
  end
  slot(0)
  redis.call('SET', state, string.rep('\0', HEADER) .. cells .. ring, 'KEEPTTL')
  for k = 1, 2 do tails[k] = math.max(tails[k] - (n - keep), 0) end
  n, cap = keep, needed
end
local stamp = struct.pack('>I7', now)
for i = n, n + weight - 1 do redis.call('SETRANGE', state, RING + (i % cap) * ENTRY, stamp) end
if present ~= newest then
  redis.call('SETRANGE', state, HEADER + (newest % CELLS) * 4, struct.pack('>I4', newest_count))
  for i = math.max(newest + 1, oldest), present - 1 do
    if slot(i) > 0 then redis.call('SETRANGE', state, HEADER + (i % CELLS) * 4, '\0\0\0\0') end
  end
  newest_count = 0
end
redis.call('SETRANGE', state, 0, struct.pack(FORMAT, VERSION, n + weight, now, cap, tails[1], tails[2],
  day_count + weight, day_tail, newest_count + weight))
if fresh or present ~= newest then -- once a cell is enough: until then it lives a cell longer than it must
  redis.call('PEXPIRE', state, math.ceil((now - real + DAY + 2 * CELL) / 1000))
end
if concurrency > 0 then
  local ttl = tonumber(ARGV[7])
  redis.call('ZREMRANGEBYSCORE', leases, '-inf', string.format('%.0f', real))
  redis.call('ZADD', leases, string.format('%.0f', real + ttl * 1000), ARGV[6])
  redis.call('PEXPIRE', leases, ttl)
  answer[2] = answer[2] + 1
end
for k = 3, 9, 3 do answer[k] = math.max(answer[k] - weight, 0) end
return answer
