//! The system calls that need `unsafe`, or that the crates at hand do not wrap.

#![expect(unsafe_code, reason = "this is the one place of the crate for it; one operation a block")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use tokio::io::unix::AsyncFd;

/// Opens `path` inside `root` for reading: links and `..` are followed within the root, never out.
pub(crate) fn open_in_root(root: &Path, path: &Path) -> io::Result<File> {
    let root = File::open(root)?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    Ok(openat2(root.as_fd(), path, how)?.into())
}

/// A descriptor that becomes readable when the process ends.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers alone.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the descriptor is new and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal to the process behind `pidfd`, and to no other that has its number by now.
pub(crate) fn pidfd_signal(pidfd: &OwnedFd, signal: i32) -> io::Result<()> {
    let no_info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: no memory is passed; the descriptor is open.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, no_info, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets the runtime wait until `fd` is readable.
pub(crate) fn watch_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor stays open, and stays itself, as long as the watcher has it.
    unsafe { AsyncFd::register(fd) }.map_err(Into::into)
}

/// Takes over a descriptor that another process left open for this one.
pub(crate) fn inherited_fd(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller was given the number on its command line, by itself before an exec.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A system-call filter, ready for the kernel.
pub(crate) struct Filter(Vec<libc::sock_filter>);

impl Filter {
    /// Reads a program as libseccomp writes it; `None` if it cannot be one.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let (instructions, rest) = bytes.as_chunks::<8>();
        // The kernel's own limit is BPF_MAXINSNS.
        if instructions.is_empty() || instructions.len() > 4096 || !rest.is_empty() {
            return None;
        }
        let instruction = |&[c0, c1, jt, jf, k0, k1, k2, k3]: &[u8; 8]| libc::sock_filter {
            code: u16::from_ne_bytes([c0, c1]),
            jt,
            jf,
            k: u32::from_ne_bytes([k0, k1, k2, k3]),
        };
        Some(Self(instructions.iter().map(instruction).collect()))
    }

    /// Puts the filter on the calling thread, for good; its children inherit it. Needs
    /// no-new-privileges, or CAP_SYS_ADMIN.
    pub(crate) fn install(&self) -> io::Result<()> {
        let len = u16::try_from(self.0.len()).map_err(io::Error::other)?;
        let program = libc::sock_fprog { len, filter: self.0.as_ptr().cast_mut() };
        // SAFETY: the program and its instructions live until the call is over, and the kernel only
        // reads them.
        let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Lets go of the program's own code in memory; what is still needed is read again, page by page.
///
/// For a process that has little left to do, or has done what it does once: code is never written to, so nothing is lost. Data,
/// also such as is read-only by now, is left alone.
pub fn let_go_of_code() -> io::Result<()> {
    let program = std::fs::read_link("/proc/self/exe")?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let code = maps.lines().filter(|line| line.contains(" r-xp ") && line.ends_with(&*program.to_string_lossy()));
    for line in code {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let parse = |text: &str| usize::from_str_radix(text, 16).ok();
        let Some((start, end)) = range.and_then(|(start, end)| Some((parse(start)?, parse(end)?))) else { continue };
        let address = start as *mut libc::c_void;
        // SAFETY: the range is the program's own code, mapped from its file and unchanged; the advice
        // only says that neighbours of a page need not come with it.
        unsafe { libc::madvise(address, end - start, libc::MADV_RANDOM) };
        // SAFETY: the same range; dropped pages come back from the file when they are executed.
        if unsafe { libc::madvise(address, end - start, libc::MADV_DONTNEED) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
