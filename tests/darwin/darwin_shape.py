"""The package as macOS has it, on a Linux machine: its modules find what CPython on macOS has, and no more.

``install`` hooks the import of the project's modules. An import statement in one of them gives ``os``, ``sys``,
``fcntl`` and the others below as they are on macOS: names that macOS lacks are not there, sys.platform is "darwin",
what macOS has besides is played as near as Linux comes to it. /proc and control groups cannot be opened by them.
Everybody else (tests, the standard library, installed packages) goes on seeing Linux: MLX and the others that run here
are Linux's. So what a standard function does inside (shutil, subprocess) is Linux's way too, and what a Mac's GPU, file
system or scheduler does is not shown at all.

What each module lacks was taken from the type stubs of the standard library (typeshed), for Python 3.10 to 3.14.
"""

from __future__ import annotations

import builtins
import errno
import os
import sys
import sysconfig
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# A * ends a name that stands for all that begin so.
ABSENT = {
    "os": """
        CLONE_* EFD_* GRND_* MFD_* NI_* PIDFD_* POSIX_FADV_* P_PIDFD RTLD_DEEPBIND RWF_* SCHED_BATCH SCHED_IDLE
        SCHED_RESET_ON_FORK SPLICE_* TFD_* XATTR_* O_DIRECT O_LARGEFILE O_NOATIME O_PATH O_RSYNC O_TMPFILE
        ST_APPEND ST_MANDLOCK ST_NOATIME ST_NODEV ST_NODIRATIME ST_NOEXEC ST_RELATIME ST_SYNCHRONOUS ST_WRITE
        copy_file_range eventfd eventfd_read eventfd_write fdatasync getrandom getresgid getresuid getxattr listxattr
        memfd_create pidfd_open pipe2 posix_fadvise posix_fallocate removexattr sched_getaffinity sched_getparam
        sched_getscheduler sched_param sched_rr_get_interval sched_setaffinity sched_setparam sched_setscheduler setns
        setresgid setresuid setxattr splice timerfd_* unshare waitid waitid_result""",
    "fcntl": """
        DN_* FASYNC FICLONE FICLONERANGE F_ADD_SEALS F_DUPFD_QUERY F_EXLCK F_GETLEASE F_GETLK64 F_GETOWN_EX
        F_GETPIPE_SZ F_GETSIG F_GET_FILE_RW_HINT F_GET_RW_HINT F_GET_SEALS F_NOTIFY F_OFD_* F_OWNER_* F_SEAL_*
        F_SETLEASE F_SETLK64 F_SETLKW64 F_SETOWN_EX F_SETPIPE_SZ F_SETSIG F_SET_* F_SHLCK LOCK_MAND LOCK_READ LOCK_RW
        LOCK_WRITE RWH_*""",
    "resource": """
        RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_OFILE RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING RUSAGE_THREAD
        prlimit""",
    "select": "EPOLL* POLLMSG POLLRDHUP epoll",
    "signal": """
        SIGCLD SIGPOLL SIGPWR SIGRTMAX SIGRTMIN SIGSTKFLT pidfd_send_signal sigtimedwait sigwaitinfo
        struct_siginfo""",
    "socket": """
        AF_ALG AF_ASH AF_ATM* AF_AX25 AF_BRIDGE AF_CAN AF_ECONET AF_IRDA AF_KEY AF_LLC AF_NETBEUI AF_NETLINK AF_NETROM
        AF_PACKET AF_PPPOX AF_QIPCRTR AF_RDS AF_ROSE AF_SECURITY AF_TIPC AF_VSOCK AF_WANPIPE AF_X25 ALG_* CAN_*
        IOCTL_* IPPROTO_MPTCP IPPROTO_UDPLITE IP_BIND_ADDRESS_NO_PORT IP_TRANSPARENT J1939_* MSG_CMSG_CLOEXEC
        MSG_CONFIRM MSG_ERRQUEUE MSG_FASTOPEN MSG_MORE NETLINK_* PACKET_* PF_CAN PF_PACKET PF_RDS SCM_CREDENTIALS
        SCM_J1939_* SOCK_CLOEXEC SOCK_NONBLOCK SOL_ALG SOL_CAN_* SOL_RDS SOL_TIPC SO_BINDTODEVICE SO_DOMAIN
        SO_INCOMING_CPU SO_J1939_* SO_MARK SO_PASSCRED SO_PASSSEC SO_PEERCRED SO_PEERSEC SO_PRIORITY SO_PROTOCOL
        SO_VM_* TCP_CONGESTION TCP_CORK TCP_DEFER_ACCEPT TCP_INFO TCP_KEEPIDLE TCP_LINGER2 TCP_QUICKACK TCP_SYNCNT
        TCP_USER_TIMEOUT TCP_WINDOW_CLAMP TIPC_* UDPLITE_* VMADDR_* VM_SOCKETS_*""",
    "time": "CLOCK_BOOTTIME CLOCK_TAI pthread_getcpuclockid",
    "errno": """
        EADV EBADE EBADFD EBADR EBADRQC EBADSLT EBFONT ECHRNG ECOMM EDEADLOCK EDOTDOT EISNAM EKEY* EL2HLT EL2NSYNC
        EL3HLT EL3RST ELIB* ELNRNG EMEDIUMTYPE ENAVAIL ENOANO ENOCSI ENOKEY ENOMEDIUM ENONET ENOPKG ENOTNAM ENOTUNIQ
        EREMCHG EREMOTEIO ERESTART ERFKILL ESRMNT ESTRPIPE EUCLEAN EUNATCH EXFULL""",
    "mmap": """
        MADV_DODUMP MADV_DOFORK MADV_DONTDUMP MADV_DONTFORK MADV_HUGEPAGE MADV_HWPOISON MADV_MERGEABLE
        MADV_NOHUGEPAGE MADV_REMOVE MADV_UNMERGEABLE MAP_DENYWRITE MAP_EXECUTABLE MAP_POPULATE MAP_STACK""",
    "termios": """
        B460800 B500000 B576000 B921600 B1000000 B1152000 B1500000 B2000000 B2500000 B3000000 B3500000 B4000000 CBAUD
        CBAUDEX CIBAUD IOCSIZE_* IUCLC NCC N_MOUSE N_PPP N_SLIP N_STRIP N_TTY OLCUC TCFLSH TCGETA TCGETS TCSBRK TCSBRKP
        TCSETA* TCSETS* TCXONC TIOCGICOUNT TIOCGLCKTRMIOS TIOCGSERIAL TIOCGSOFTCAR TIOCINQ TIOCLINUX TIOCMIWAIT
        TIOCSER* TIOCSLCKTRMIOS TIOCSSERIAL TIOCSSOFTCAR VSWTC VSWTCH XCASE XTABS""",
}

# What pip does not install with the project there: a Mac has Metal, and without numba the CPU takes plain operations.
NOT_INSTALLED = ("numba", "llvmlite")

PAGE = 16384
INT_MAX = 2**31 - 1
F_NOCACHE, F_FULLFSYNC = 48, 51

# The commands that were given to fcntl which only macOS has, each with the inode it was for.
commands: list[tuple[int, int]] = []


# What is there, but otherwise. Each looks up the real function when called: a test may have replaced it.


def _fcntl(fd: Any, command: int, argument: Any = 0) -> Any:
    import fcntl

    if command not in (F_NOCACHE, F_FULLFSYNC):
        return fcntl.fcntl(fd, command, argument)
    fd = fd if isinstance(fd, int) else fd.fileno()
    commands.append((command, os.fstat(fd).st_ino))  # an error if it is no descriptor
    if command == F_FULLFSYNC:
        os.fsync(fd)
    return 0


def _fsync(fd: int) -> None:
    raise AssertionError("os.fsync does not reach the disk on macOS: system.flush does")


def _at_most_int_max(name: str, size: Callable[[Any], int]) -> Callable[..., Any]:
    """A read or write at an offset, which macOS refuses from 2 GiB on."""

    def call(fd: int, what: Any, *rest: Any) -> Any:
        if size(what) > INT_MAX:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return getattr(os, name)(fd, what, *rest)

    return call


def _sendfile(out_fd: int, in_fd: int, offset: int, count: int, *rest: Any, **named: Any) -> int:
    """To a socket only. What else can be given there, headers and trailers, is not played."""
    import stat

    if not stat.S_ISSOCK(os.fstat(out_fd).st_mode):
        raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
    return os.sendfile(out_fd, in_fd, offset, count)


def _uname() -> os.uname_result:
    kernel = "Darwin Kernel Version 24.6.0"
    return os.uname_result(("Darwin", os.uname().nodename, "24.6.0", kernel, "arm64"))


def _sysconf(name: str | int) -> int:
    if name in ("SC_AVPHYS_PAGES", "SC_MINSIGSTKSZ"):
        raise ValueError("unrecognized configuration name")
    if name in ("SC_PAGE_SIZE", "SC_PAGESIZE"):
        return PAGE
    if name == "SC_PHYS_PAGES":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // PAGE
    return os.sysconf(name)


def _getrusage(who: int) -> Any:
    import resource

    usage = list(resource.getrusage(who))
    usage[2] *= 1024  # ru_maxrss, in bytes
    return resource.struct_rusage(usage)


class _Libc:
    """The C library, with macOS's sysctlbyname."""

    def __init__(self, real: Any) -> None:
        self._real = real

        def sysctlbyname(name: bytes, value: Any, size: Any, new: Any, new_size: int) -> int:
            import psutil

            known = {
                b"vm.page_free_count": psutil.virtual_memory().available // PAGE,
                b"vm.page_purgeable_count": 0,
                b"vm.page_pageable_external_count": 0,
                b"kern.memorystatus_vm_pressure_level": 1,
                b"iogpu.wired_limit_mb": 0,
                b"sysctl.proc_translated": 0,
            }
            if name not in known:
                return -1
            size._obj.value = 4
            value[:4] = known[name].to_bytes(4, sys.byteorder)
            return 0

        self.sysctlbyname = sysctlbyname

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _cdll(name: str | None, *rest: Any, **named: Any) -> Any:
    import ctypes

    library = ctypes.CDLL(name, *rest, **named)
    return library if name is not None or hasattr(library, "sysctlbyname") else _Libc(library)


def _bytes_of(buffers: Any) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)


INSTEAD: dict[str, dict[str, Any]] = {
    "ctypes": {"CDLL": _cdll},
    "os": {
        "fsync": _fsync,
        "pread": _at_most_int_max("pread", int),
        "pwrite": _at_most_int_max("pwrite", lambda data: memoryview(data).nbytes),
        "preadv": _at_most_int_max("preadv", _bytes_of),
        "pwritev": _at_most_int_max("pwritev", _bytes_of),
        "sendfile": _sendfile,
        "sysconf": _sysconf,
        "uname": _uname,
    },
    "sys": {"platform": "darwin"},
    "platform": {
        "machine": lambda: "arm64",
        "mac_ver": lambda *_: ("15.6", ("", "", ""), "arm64"),
        "processor": lambda: "arm",
        "release": lambda: "24.6.0",
        "system": lambda: "Darwin",
    },
    "fcntl": {"F_FULLFSYNC": F_FULLFSYNC, "F_GETPATH": 50, "F_NOCACHE": F_NOCACHE, "fcntl": _fcntl},
    "mmap": {"ALLOCATIONGRANULARITY": PAGE, "PAGESIZE": PAGE},
    "resource": {"getrusage": _getrusage},
}


class Shaped(ModuleType):
    """A module of the standard library as macOS has it. What is set in it is set in the real one."""

    def __init__(self, real: ModuleType) -> None:
        super().__init__(real.__name__, real.__doc__)
        absent = ABSENT.get(real.__name__, "").split()
        names = frozenset(name for name in absent if not name.endswith("*"))
        beginnings = tuple(name[:-1] for name in absent if name.endswith("*"))
        self.__dict__.update(INSTEAD.get(real.__name__, {}))
        self.__dict__.update(_real=real, _names=names, _beginnings=beginnings)

    def _lacks(self, name: str) -> bool:
        return name in self._names or (bool(self._beginnings) and name.startswith(self._beginnings))

    def __getattr__(self, name: str) -> Any:
        if self._lacks(name):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on macOS")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self._real, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            del self.__dict__[name]
        else:
            delattr(self._real, name)

    def __dir__(self) -> list[str]:
        there = {name for name in dir(self._real) if not self._lacks(name)}
        return sorted(there | INSTEAD.get(self.__name__, {}).keys())


_shaped: dict[str, Shaped] = {}


def _import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    if name.partition(".")[0] in NOT_INSTALLED and not level:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = builtins.__import__(name, globals, locals, fromlist, level)
    if level or (module.__name__ not in ABSENT and module.__name__ not in INSTEAD):
        return module
    return _shaped.get(module.__name__) or _shaped.setdefault(module.__name__, Shaped(module))


BUILTINS = {**vars(builtins), "__import__": _import}


class Loader(SourceFileLoader):
    """Loads a module whose import statements go through ``_import``."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = BUILTINS
        super().exec_module(module)


class Finder(MetaPathFinder):
    """Finds the project's modules where the other finders do, and gives them the loader above."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in ("mlx_flashmoe", "examples"):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if isinstance(spec.loader, SourceFileLoader):
                    spec.loader = Loader(spec.loader.name, spec.loader.path)
                return spec
        return None


HIDDEN = ("/proc/", "/sys/fs/cgroup/")
_STDLIB = sysconfig.get_path("stdlib") + os.sep


def _hide(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuses the project's modules, and the standard library's on their behalf, what macOS has no file for."""
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes):
        path = os.fsdecode(arguments[0])
        if f"{path}/".startswith(HIDDEN) and _project_asks():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _project_asks() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_builtins is BUILTINS:
            return True
        file = frame.f_code.co_filename
        if not file.startswith(("<frozen", _STDLIB)) or "site-packages" in file:
            return False
        frame = frame.f_back
    return False


def install() -> None:
    """Shapes this process, if it runs on Linux. A Mac has the shape already."""
    if sys.platform == "linux":
        sys.meta_path.insert(0, Finder())
        sys.addaudithook(_hide)
