-- A key's version, as PostgreSQL has it, unless a later one has come meanwhile.
-- KEYS 1 version name   ARGV 1 version   2 ttl, s   Answer: 1 written, 0 overtaken by a higher one.
local present = redis.call('GET', KEYS[1])
if present and tonumber(present) > tonumber(ARGV[1]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 1
