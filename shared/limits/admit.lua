-- One admission: the key's version, then for each subject that the request draws on (the key; its user's and its
-- organisation's ceilings) three windows and the requests at once. All or nothing: a refusal writes nothing anywhere.
--
-- KEYS  for each subject: state (string), leases (sorted set); last the key's version (only when ARGV[4] is not empty)
-- ARGV  1 weight   2 lease id   3 lease ttl, ms   4 the version that the caller knows ('' to skip)
--       then for each subject: per minute, per hour, per day (-1: no such window), concurrency (0: any)
-- Answer {1 admitted | 0 refused | -1 other version, then for each subject: active leases, and for minute, hour, day:
--       remaining, reset, wait}
--       reset: µs until the window gives something back; wait: µs until this request fits, 0 where it does now.
--
-- State: header, `cells` (289, or 0 without a day) five-minute cells of the day (u32), then a ring of the last `cap`
-- times (u56, µs since 1970): entry i stands in slot i % cap. Minute and hour are exact: an entry at t counts in
-- (now - W, now]. The day counts the oldest of its cells whole, so it can only be stricter than the truth. The newest
-- cell's count is in the header and moves to its slot when the next cell begins. Weight 0 looks and records nothing.

local VERSION, HEADER, CELLS, ENTRY, CAP_MAX = 3, 48, 289, 7, 1000000
local MINUTE, HOUR, DAY, CELL = 60000000, 3600000000, 86400000000, 300000000
local FORMAT = '>I1I6I7I4I6I6I6I6I4I2'

local weight, lease, lease_ttl, version = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
if version ~= '' and redis.call('GET', KEYS[#KEYS]) ~= version then return { -1 } end

local time = redis.call('TIME')
local real = tonumber(time[1]) * 1000000 + tonumber(time[2])
local answer, admitted, records = { 0 }, true, {}

local function look(which)
  local state, leases = KEYS[2 * which - 1], KEYS[2 * which]
  local quotas = { tonumber(ARGV[4 * which + 1]), tonumber(ARGV[4 * which + 2]) }
  local day_quota, concurrency = tonumber(ARGV[4 * which + 3]), tonumber(ARGV[4 * which + 4])
  local base, fits = 10 * which - 8, true

  local n, last, cap, tails, day_count, day_tail, newest_count, kept = 0, 0, 0, { 0, 0 }, 0, 0, 0, 0
  local header = redis.call('GETRANGE', state, 0, HEADER - 1)
  if #header == HEADER and header:byte(1) == VERSION then
    local _
    _, n, last, cap, tails[1], tails[2], day_count, day_tail, newest_count, kept = struct.unpack(FORMAT, header)
    if kept ~= CELLS then kept = 0 end
    if cap > CAP_MAX then n, cap = 0, 0 end -- damaged
  end
  local now = math.max(real, last) -- a clock that went back stands still here
  local present = math.floor(now / CELL)
  local newest = n > 0 and math.floor(last / CELL) or present
  local ring_at = HEADER + kept * 4

  local function entry(i)
    local at = ring_at + (i % cap) * ENTRY
    return (struct.unpack('>I7', redis.call('GETRANGE', state, at, at + ENTRY - 1)))
  end

  local cells -- the slots of all cells, read when one is asked for
  local function slot(i)
    if not cells then
      cells = kept > 0 and redis.call('GETRANGE', state, HEADER, ring_at - 1) or string.rep('\0', CELLS * 4)
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

  -- The exact windows. Without one, its tail only keeps up with the ring.
  for k = 1, 2 do
    local window, quota, at = k == 1 and MINUTE or HOUR, quotas[k], base + 3 * k - 2
    local remaining, reset, wait = 0, 0, 0
    tails[k] = math.max(tails[k], n - cap)
    if quota >= 0 then
      local first = now
      if last <= now - window then tails[k] = n else tails[k], first = first_after(now - window, tails[k]) end
      local used = n - tails[k]
      if weight > quota then
        wait = window
      elseif weight > 0 and used + weight > quota then
        wait = entry(n + weight - quota - 1) + window - real
      end
      if wait > 0 then fits = false end
      remaining, reset = quota - used, first + window - real
    end
    answer[at], answer[at + 1], answer[at + 2] = remaining, reset, wait
  end

  -- The day. Every loop ends whatever the state says: a script that does not would stop Redis for everybody.
  local remaining, reset, wait, oldest = 0, 0, 0, present - CELLS + 1
  if day_quota >= 0 then
    if kept == 0 and n > 0 then -- a day where there was none: what the ring knows of, as if it were now
      newest, newest_count = present, n - math.min(tails[1], tails[2])
      day_count, day_tail = newest_count, present
    elseif present ~= newest then
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
    if weight > day_quota then
      wait = DAY
    elseif weight > 0 and day_count + weight > day_quota then
      local excess, i = day_count + weight - day_quota, math.max(day_tail, oldest)
      while i < present and excess > cell(i) do excess, i = excess - cell(i), i + 1 end
      wait = (i + CELLS) * CELL - real
    end
    if wait > 0 then fits = false end
    remaining, reset = day_quota - day_count, (day_tail + CELLS) * CELL - real
  end
  answer[base + 7], answer[base + 8], answer[base + 9] = remaining, reset, wait

  answer[base] = 0
  if concurrency > 0 and weight > 0 then
    local active = redis.call('ZCOUNT', leases, '(' .. string.format('%.0f', real), '+inf')
    answer[base] = active
    if active >= concurrency then fits = false end
  end
  admitted = admitted and fits

  -- A state of the wrong shape is rebuilt; the ring shrinks only when its longest window fits into the shorter one.
  local function rebuild(wanted, needed)
    local keep = math.min(n, cap, needed)
    local ring = ''
    if keep > 0 then
      local from = (n - keep) % cap
      local straight = math.min(keep, cap - from)
      ring = redis.call('GETRANGE', state, ring_at + from * ENTRY, ring_at + (from + straight) * ENTRY - 1)
      if keep > straight then
        ring = ring .. redis.call('GETRANGE', state, ring_at, ring_at + (keep - straight) * ENTRY - 1)
      end
    end
    if wanted > 0 then slot(0) end
    redis.call('SET', state, string.rep('\0', HEADER) .. (wanted > 0 and cells or '') .. ring, 'KEEPTTL')
    for k = 1, 2 do tails[k] = math.max(tails[k] - (n - keep), 0) end
    n, cap, kept, ring_at = keep, needed, wanted, HEADER + wanted * 4
  end

  records[which] = function()
    local longest = quotas[2] >= 0 and 2 or 1
    local expires = n == 0 or present ~= math.floor(last / CELL) -- once a cell is enough: it lives a cell too long
    local needed, wanted = math.max(quotas[1], quotas[2], 0), day_quota >= 0 and CELLS or 0
    if kept ~= wanted or cap < needed or (cap > needed and n - tails[longest] <= needed) then
      rebuild(wanted, math.max(needed, kept ~= wanted and n - tails[longest] > needed and cap or 0))
      expires = true
    end
    if cap > 0 then
      local stamp = struct.pack('>I7', now)
      for i = n, n + weight - 1 do redis.call('SETRANGE', state, ring_at + (i % cap) * ENTRY, stamp) end
    end
    if kept > 0 then
      if present ~= newest then
        redis.call('SETRANGE', state, HEADER + (newest % CELLS) * 4, struct.pack('>I4', newest_count))
        for i = math.max(newest + 1, oldest), present - 1 do
          if slot(i) > 0 then redis.call('SETRANGE', state, HEADER + (i % CELLS) * 4, '\0\0\0\0') end
        end
        newest_count = 0
      end
      day_count, newest_count = day_count + weight, newest_count + weight
    else
      day_count, day_tail, newest_count = 0, 0, 0
    end
    redis.call('SETRANGE', state, 0, struct.pack(FORMAT, VERSION, n + weight, now, cap, tails[1], tails[2],
      day_count, day_tail, newest_count, kept))
    if expires then
      local span = kept > 0 and DAY + CELL or quotas[2] >= 0 and HOUR or MINUTE
      redis.call('PEXPIRE', state, math.ceil((now - real + span + CELL) / 1000))
    end
    if concurrency > 0 then
      redis.call('ZREMRANGEBYSCORE', leases, '-inf', string.format('%.0f', real))
      redis.call('ZADD', leases, string.format('%.0f', real + lease_ttl * 1000), lease)
      redis.call('PEXPIRE', leases, lease_ttl)
      answer[base] = answer[base] + 1
    end
    for k = 1, 7, 3 do answer[base + k] = answer[base + k] - weight end
  end
end

for which = 1, math.floor(#KEYS / 2) do look(which) end
if admitted then
  answer[1] = 1
  if weight > 0 then
    for _, record in ipairs(records) do record() end
  end
end
for i = 3, #answer do
  if (i - 3) % 10 % 3 == 0 and answer[i] < 0 then answer[i] = 0 end
end
return answer
