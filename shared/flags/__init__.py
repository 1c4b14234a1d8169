"""Feature flags: which build serves a model alias, decided by Unleash for this customer.

    flags = Flags(FlagSettings(url=…, token=…, app_name="chat", backup=Path(…)))
    await flags.start()                     # never waits for Unleash to be up
    decision = flags.model_build("chat-mini", user_id=…, org_id=…, plan=…, key_id=…)
    if not decision.allowed: 503            # ops.<alias>.allowed is off
    build = decision.build or <the catalogue's stable build>

Layers, top down:
    builds.py    Flags and BuildDecision: the flag scheme `model.<alias>` / `ops.<alias>.allowed`
    provider.py  UnleashProvider: OpenFeature's provider contract over UnleashClient's public hooks
    store.py     FlagStore: the last good flag set, in memory and in one file written atomically

Failure modes. Unleash slow or down: evaluations go on from memory, `stale` turns true after `stale_after_ms`. Down at
start: the backup file serves. No backup either, unknown flag, malformed payload: `build` is None and the caller serves
its stable build. An answer that is not a flag set is refused and changes nothing. No evaluation does I/O or raises.

Make `Flags` after a fork (it runs threads), and give each process its own backup file.
"""

from shared.flags.builds import BuildDecision, Flags, FlagState
from shared.flags.provider import FlagSettings, UnleashProvider

__all__ = ["BuildDecision", "FlagSettings", "FlagState", "Flags", "UnleashProvider"]
