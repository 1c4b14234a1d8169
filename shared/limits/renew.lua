-- Leases that are still in use live on, by the server's clock; one that expired meanwhile is not brought back.
-- KEYS 1 leases   ARGV 1 ttl, ms   2… lease ids   Answer: how many were renewed.
local time = redis.call('TIME')
local real = tonumber(time[1]) * 1000000 + tonumber(time[2])
local ttl, renewed = tonumber(ARGV[1]), 0
for i = 2, #ARGV do
  local expiry = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if expiry and tonumber(expiry) > real then
    redis.call('ZADD', KEYS[1], string.format('%.0f', real + ttl * 1000), ARGV[i])
    renewed = renewed + 1
  end
end
if renewed > 0 then redis.call('PEXPIRE', KEYS[1], ttl) end
return renewed
