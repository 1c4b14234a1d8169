-- A reservation of tokens becomes what was used; the rest is free again, as if it had never been reserved.
--
-- KEYS 1 state, as in reserve_tokens.lua   ARGV 1 entry's number   2 entry's time   3 tokens used
-- Answer: how many were given back (negative: more was used than reserved); 0 for an entry that has left the window.

local VERSION, HEADER, ENTRY, FORMAT = 1, 31, 12, '>I1I6I6I4I7I7'
local state, number, time, used = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])

local header = redis.call('GETRANGE', state, 0, HEADER - 1)
if #header ~= HEADER or header:byte(1) ~= VERSION then return 0 end
local _, n, tail, cap, sum, last = struct.unpack(FORMAT, header)
if cap < 1 or number < tail or number >= n then return 0 end
local at = HEADER + (number % cap) * ENTRY
local slot = redis.call('GETRANGE', state, at, at + ENTRY - 1)
if #slot ~= ENTRY then return 0 end
local stamp, held = struct.unpack('>I7I5', slot)
if stamp ~= time then return 0 end -- another reservation's: the state was lost meanwhile
redis.call('SETRANGE', state, at, struct.pack('>I7I5', stamp, used))
redis.call('SETRANGE', state, 0, struct.pack(FORMAT, VERSION, n, tail, cap, sum - held + used, last))
return held - used
