"""Become another user and run a program: PostgreSQL refuses to run as root.

`python -m deploy.local.unprivileged [--keep-file-access] USER COMMAND…` replaces this process by COMMAND.
"""

import ctypes
import os
import pwd
import stat
import struct
import subprocess
import sys
from pathlib import Path

from deploy.local.errors import LaunchError

DATABASE_USER = "pgserver"  # the name that the PostgreSQL wheel's own wrapper uses

# <linux/prctl.h>, <linux/securebits.h>, <linux/capability.h>
_PR_SET_SECUREBITS = 28
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAP_DAC_OVERRIDE = 1
_CAPABILITY_VERSION_3 = 0x20080522


def ensure_user(name: str) -> pwd.struct_passwd:
    """The system user, made when it is missing (root only). Raises LaunchError when that fails."""
    try:
        return pwd.getpwnam(name)
    except KeyError:
        pass
    command = ("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", name)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        return pwd.getpwnam(name)
    except (OSError, subprocess.CalledProcessError, KeyError):
        raise LaunchError(
            f"PostgreSQL refuses to run as root, and the user {name} for it cannot be made. "
            "Run this as an ordinary user."
        ) from None


def is_open(path: Path) -> bool:
    """Whether a user without any right of its own can walk down to this file or directory and read or enter it."""
    if path.is_file() and not path.stat().st_mode & stat.S_IROTH:
        return False
    return all(part.stat().st_mode & stat.S_IXOTH for part in (path, *path.parents))


def command_as(user: str, program: Path, directory: Path, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The command that runs `program` as `user`, whose own files are below `directory`.

    Where the checkout or the state lies below a closed directory (root's home, a mktemp -d), the process keeps root's
    right to read and walk past permissions, and no other; opening those directories to everybody would be worse.
    """
    keep = () if is_open(program) and is_open(directory) else ("--keep-file-access",)
    return (sys.executable, "-m", "deploy.local.unprivileged", *keep, user, str(program), *arguments)


def drop(user: str, *, keep_file_access: bool) -> None:
    """Become `user` for good, with its own group only. Needs root; raises OSError."""
    entry = pwd.getpwnam(user)
    libc = ctypes.CDLL(None, use_errno=True)
    if keep_file_access:
        # Without this bit access(2), by which PostgreSQL looks at its own binaries, ignores what is kept.
        _check(libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0))
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    if keep_file_access:
        header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
        mask = 1 << _CAP_DAC_OVERRIDE
        # Two rows (low and high half) of effective, permitted, inheritable.
        _check(libc.capset(header, struct.pack("=6I", mask, mask, mask, 0, 0, 0)))
        _check(libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE, 0, 0))
    os.environ["HOME"] = "/"


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main(arguments: list[str]) -> None:
    """Drop and exec; never returns."""
    keep = arguments[0] == "--keep-file-access"
    user, program, *rest = arguments[1:] if keep else arguments
    drop(user, keep_file_access=keep)
    os.execv(program, [program, *rest])  # noqa: S606 no shell is meant


if __name__ == "__main__":
    main(sys.argv[1:])
