"""Which users see the challenger: a stable hash puts each into one of 10,000 buckets."""

from __future__ import annotations

import hashlib

BUCKETS = 10_000


def bucket(user_id: int, salt: str) -> int:
    """The user's bucket in 0..9999 under this salt: the same in every process, forever.

    The challenger serves the buckets below the rollout's share, so a larger share only adds buckets and nobody is
    moved back; a new rollout has a new salt, so the same users are not always first.
    """
    digest = hashlib.blake2b(f"{salt}:{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % BUCKETS


def serves_challenger(user_id: int, salt: str, share: int) -> bool:
    """Whether the challenger serves this user while `share` of the 10,000 buckets are its own."""
    return bucket(user_id, salt) < share
