//! The system calls that need `unsafe`, or that the crates at hand do not wrap.

#![expect(unsafe_code, reason = "this is the one place of the crate for it; one operation a block")]

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, OpenHow, ResolveFlag, fcntl, openat2};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::unix::AsyncFd;

/// Opens `path` inside `root` for reading: links and `..` are followed within the root, never out.
pub(crate) fn open_in_root(root: &Path, path: &Path) -> io::Result<File> {
    open_in_root_for(root, path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)
}

/// The same, to mount something there; nothing of it is read.
pub(crate) fn open_place_in_root(root: &Path, path: &Path) -> io::Result<File> {
    open_in_root_for(root, path, OFlag::O_PATH)
}

fn open_in_root_for(root: &Path, path: &Path, flags: OFlag) -> io::Result<File> {
    let root = File::open(root)?;
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    Ok(openat2(root.as_fd(), path, how)?.into())
}

/// Links to follow in one path; as many as the kernel does.
const LINKS_MAX: usize = 40;

/// The host's path of a directory within `root`, made if it is not there, also where links lead to it; they never
/// lead out.
pub(crate) fn ensure_dir(root: &Path, inside: &Path, owner: Option<(u32, u32)>) -> io::Result<PathBuf> {
    ensure_dir_after(root, inside, owner, 0)
}

fn ensure_dir_after(root: &Path, inside: &Path, owner: Option<(u32, u32)>, links: usize) -> io::Result<PathBuf> {
    if links > LINKS_MAX {
        return Err(io::Error::from_raw_os_error(libc::ELOOP));
    }
    let mut at = open_in_root(root, Path::new("."))?;
    let mut so_far = PathBuf::new();
    for part in inside.components() {
        let before = so_far.clone();
        so_far.push(part);
        let found = match open_in_root(root, &so_far) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // By what is open: another may put a link in its place meanwhile.
                let new = path_of(&at).join(part);
                if let Ok(target) = fs::read_link(&new) {
                    // A link to what is not there yet.
                    let beyond = target.strip_prefix("/").map_or_else(|_| before.join(&target), Path::to_owned);
                    ensure_dir_after(root, &beyond, owner, links + 1)?;
                    open_in_root(root, &so_far)?
                } else {
                    fs::create_dir(&new)?;
                    let made = open_in_root(root, &so_far)?;
                    fs::set_permissions(path_of(&made), fs::Permissions::from_mode(0o755))?;
                    if let Some((uid, gid)) = owner {
                        chown(path_of(&made), Some(uid), Some(gid))?;
                    }
                    made
                }
            }
            found => found?,
        };
        if !found.metadata()?.is_dir() {
            return Err(io::Error::new(
                io::ErrorKind::NotADirectory,
                format!("/{} is not a directory", so_far.display()),
            ));
        }
        at = found;
    }
    fs::read_link(path_of(&at))
}

/// What is open, whatever stands at its path meanwhile.
fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Opens a program by a view of it that nobody can write through, also not by way of the processes that
/// run it: what `/proc/PID/exe` leads to is this view.
pub(crate) fn seal_program(path: &Path) -> io::Result<OwnedFd> {
    let view = clone_mount(path, Depth::Alone)?;
    set_mount(&view, &mount_attr(libc::MOUNT_ATTR_RDONLY, 0), Depth::Alone)?;
    Ok(view)
}

/// Mounts `path` at `target`, without what is mounted below it, with owners as `user_namespace` maps them.
pub(crate) fn mount_shifted(path: &Path, target: &Path, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    let view = clone_mount(path, Depth::Alone)?;
    let shifted = libc::mount_attr {
        userns_fd: u64::try_from(user_namespace.as_raw_fd()).map_err(io::Error::other)?,
        // What is mounted in the one is not to appear in the other.
        ..mount_attr(libc::MOUNT_ATTR_IDMAP, libc::MS_PRIVATE)
    };
    set_mount(&view, &shifted, Depth::Alone)?;
    put_mount(&view, &open_place(target)?)
}

/// Whether a mount's change is for what is mounted below it, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    Alone,
    WithAllBelow,
}

/// How a bind is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bind {
    pub(crate) depth: Depth,
    pub(crate) read_only: Option<Depth>,
    /// `MS_PRIVATE` and so on.
    pub(crate) propagation: (u64, Depth),
}

/// Binds `path` at what `place` is.
pub(crate) fn bind(path: &Path, place: &File, how: Bind) -> io::Result<()> {
    let view = clone_mount(path, how.depth)?;
    let (propagation, depth) = how.propagation;
    set_mount(&view, &mount_attr(0, propagation), depth)?;
    if let Some(depth) = how.read_only {
        set_mount(&view, &mount_attr(libc::MOUNT_ATTR_RDONLY, 0), depth)?;
    }
    put_mount(&view, place)
}

const fn mount_attr(set: u64, propagation: u64) -> libc::mount_attr {
    libc::mount_attr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 }
}

/// Something to mount at; nothing of it is read.
fn open_place(path: &Path) -> io::Result<File> {
    fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)
}

/// A mount of `path` that is nowhere yet.
fn clone_mount(path: &Path, depth: Depth) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | depth.flag();
    // SAFETY: the path is a string that ends in NUL and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the descriptor is new and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_mount(view: &OwnedFd, attributes: &libc::mount_attr, depth: Depth) -> io::Result<()> {
    let (fd, empty, len) = (view.as_raw_fd(), c"".as_ptr(), size_of::<libc::mount_attr>());
    let flags = libc::AT_EMPTY_PATH.cast_unsigned() | depth.flag();
    // SAFETY: path and attributes outlive the call, and the length is the attributes' own.
    let result =
        unsafe { libc::syscall(libc::SYS_mount_setattr, fd, empty, flags, std::ptr::from_ref(attributes), len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn put_mount(view: &OwnedFd, place: &File) -> io::Result<()> {
    let (from, to, empty) = (view.as_raw_fd(), place.as_raw_fd(), c"".as_ptr());
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are empty strings that end in NUL.
    let moved = unsafe { libc::syscall(libc::SYS_move_mount, from, empty, to, empty, flags) };
    if moved < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Depth {
    const fn flag(self) -> u32 {
        match self {
            Self::Alone => 0,
            Self::WithAllBelow => libc::AT_RECURSIVE.cast_unsigned(),
        }
    }
}

/// Makes a subvolume of btrfs.
pub(crate) fn create_subvolume(path: &Path) -> io::Result<()> {
    change_subvolume(path, BTRFS_IOC_SUBVOL_CREATE, -1)
}

/// Makes a subvolume that is what another one is now, and may be changed.
pub(crate) fn snapshot_subvolume(from: &Path, path: &Path) -> io::Result<()> {
    let from = File::open(from)?;
    change_subvolume(path, BTRFS_IOC_SNAP_CREATE, from.as_raw_fd())
}

/// Numbers and arguments of `linux/btrfs.h`.
const BTRFS_IOC_SNAP_CREATE: libc::Ioctl = 0x5000_9401_u32 as libc::Ioctl;
const BTRFS_IOC_SUBVOL_CREATE: libc::Ioctl = 0x5000_940e_u32 as libc::Ioctl;
const BTRFS_PATH_LEN_MAX: usize = 4087;

#[repr(C)]
struct SubvolumeArguments {
    fd: i64,
    name: [u8; BTRFS_PATH_LEN_MAX + 1],
}

fn change_subvolume(path: &Path, number: libc::Ioctl, from: RawFd) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let parent = File::open(path.parent().ok_or_else(invalid)?)?;
    let name = path.file_name().ok_or_else(invalid)?.as_encoded_bytes();
    let mut arguments = SubvolumeArguments { fd: from.into(), name: [0; BTRFS_PATH_LEN_MAX + 1] };
    arguments
        .name
        .get_mut(..name.len())
        .filter(|_| name.len() <= BTRFS_PATH_LEN_MAX)
        .ok_or_else(invalid)?
        .copy_from_slice(name);
    // SAFETY: the arguments are what these numbers take, and outlive the call; the name ends in NUL.
    let result = unsafe { libc::ioctl(parent.as_raw_fd(), number, &raw const arguments) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// From now on this thread makes files as another user, with all its capabilities as before.
pub(crate) fn make_files_as(uid: u32, gid: u32) -> io::Result<()> {
    let header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
    let mut sets = [CapabilitySets::default(); 2];
    // SAFETY: header and sets outlive the call and are as long as this version says.
    let read = unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) };
    if read < 0 {
        return Err(io::Error::last_os_error());
    }
    // Both tell the id of before, and nothing of success.
    nix::unistd::setfsgid(gid.into());
    nix::unistd::setfsuid(uid.into());
    // SAFETY: as above.
    let written = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The kernel's third, of two words a set.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilitySets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
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

/// Makes reads and writes answer at once.
pub(crate) fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Tells a terminal how large the window is that shows it.
pub(crate) fn set_terminal_size(terminal: &impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel only reads the size, which lives until the call is over.
    let result = unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits for a descriptor that is sent over `socket`, as runtimes hand out a terminal's other side.
pub(crate) fn receive_fd(socket: &UnixStream) -> io::Result<OwnedFd> {
    let (mut byte, mut space) = ([0; 64], nix::cmsg_space!([RawFd; 1]));
    let mut parts = [io::IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part
            && let Some(&fd) = fds.first()
        {
            return Ok(inherited_fd(fd));
        }
    }
    Err(io::Error::other("no descriptor came"))
}

/// Listens on a socket at `path`, however long that is: the kernel takes some 100 bytes of it.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    with_short_path(path, |short| {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        UnixListener::bind(short)
    })
}

/// Connects to a socket at `path`, however long that is.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    with_short_path(path, |short| UnixStream::connect(short))
}

fn with_short_path<T>(path: &Path, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a socket needs a name"));
    };
    let dir = File::open(parent)?;
    act(&Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name))
}

/// Lets writing to a pipe that nobody reads end the process, or fail. Rust programs begin with the
/// latter, and whatever they start inherits it; other programs count on the former.
pub(crate) fn end_by_broken_pipes(ends: bool) {
    let action = if ends { libc::SIG_DFL } else { libc::SIG_IGN };
    // SAFETY: neither action runs code of ours.
    unsafe { libc::signal(libc::SIGPIPE, action) };
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

/// How long a turn on the CPU is for those who ask for short ones: the least that the kernel takes.
const SHORT_TURN_NANOS: u64 = 100_000;

/// Asks the kernel for short turns on the CPU for this thread and all that it starts, which then come soon, however many
/// others want to run. Kernels before 6.12 take it and change nothing.
///
/// Its share of the CPU stays what it was: for whoever has little to do, and is waited for.
pub fn take_short_turns() -> io::Result<()> {
    take_turns(SHORT_TURN_NANOS)
}

/// The opposite: as long as everybody's.
pub fn take_usual_turns() -> io::Result<()> {
    take_turns(0)
}

fn take_turns(nanos: u64) -> io::Result<()> {
    // SAFETY: all of it may be zero.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = u32::try_from(size_of_val(&attributes)).expect("it is small");
    // SAFETY: the kernel writes no more than `size` bytes, which is what there is; 0 is this thread.
    if unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.size = size;
    attributes.sched_runtime = nanos;
    // SAFETY: the kernel reads `size` bytes of it.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets go of the program's own code and constants in memory; what is still needed is read again, page
/// by page.
///
/// For a process that has little left to do, or has done what it does once. Nothing is lost: only what
/// is as it stands in the program's file is dropped. Data, also such as is read-only by now but was
/// written before, is left alone.
pub fn let_go_of_code() -> io::Result<()> {
    let program = fs::read_link("/proc/self/exe")?;
    let smaps = fs::read_to_string("/proc/self/smaps")?;
    for (start, end) in unwritten(&smaps, &format!(" {}", program.display())) {
        let address = start as *mut libc::c_void;
        // SAFETY: the range is mapped from the program's file, cannot be written, and no page of it
        // was; the advice only says that neighbours of a page need not come with it.
        unsafe { libc::madvise(address, end - start, libc::MADV_RANDOM) };
        // SAFETY: the same range; dropped pages come back from the file when they are used.
        if unsafe { libc::madvise(address, end - start, libc::MADV_DONTNEED) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Memory that was freed and that the allocator keeps for itself.
#[derive(Debug, Default)]
pub struct FreedMemory {
    known: Amounts,
}

/// As they were when memory was last given back, or less since.
#[derive(Clone, Copy, Debug, Default)]
struct Amounts {
    freed: usize,
    /// What was freed and given back counts as freed for ever, but used and freed again it is resident.
    resident: usize,
}

/// Less than this is worth no walk through the heap.
const GROWN_MIN: usize = 2 << 20;

impl FreedMemory {
    /// Gives it back to the kernel, if there may be more than before. The allocator does so by
    /// itself only at the end of its heap, and what was freed by a large burst of work lies within.
    pub fn give_back(&mut self) {
        let now = Amounts { freed: freed(), resident: resident() };
        if now.freed > self.known.freed + GROWN_MIN || now.resident > self.known.resident + GROWN_MIN {
            give_back();
            self.known = Amounts { freed: now.freed, resident: resident() };
        }
        self.known.freed = self.known.freed.min(now.freed);
        self.known.resident = self.known.resident.min(now.resident);
    }
}

/// The process's own memory that is in the machine's, in bytes; nothing if the kernel does not say.
fn resident() -> usize {
    let pages = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = pages.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages
        * nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
            .ok()
            .flatten()
            .map_or(0, |len| len.unsigned_abs() as usize)
}

#[cfg(target_env = "gnu")]
fn freed() -> usize {
    // SAFETY: the call reads the allocator's own counters.
    unsafe { libc::mallinfo2() }.fordblks
}

#[cfg(target_env = "gnu")]
fn give_back() {
    // SAFETY: only pages that hold nothing are given back.
    unsafe { libc::malloc_trim(0) };
}

/// Other allocators give back by themselves.
#[cfg(not(target_env = "gnu"))]
const fn freed() -> usize {
    0
}

#[cfg(not(target_env = "gnu"))]
const fn give_back() {}

/// The mappings of `program`, a path with a space in front, that cannot be written and never were, as `/proc/self/smaps` tells.
fn unwritten(smaps: &str, program: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut current = None;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let kept = matches!(words.next(), Some("r-xp" | "r--p")) && line.ends_with(program);
            let parse = |text: &str| usize::from_str_radix(text, 16).ok();
            current = parse(start).zip(parse(end)).filter(|_| kept);
        } else if first == "Anonymous:" && words.next() == Some("0") {
            found.extend(current.take());
        }
    }
    found
}

/// What the host is called.
#[must_use]
pub fn host_name() -> String {
    nix::unistd::gethostname().map_or_else(|_| String::new(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_turns_are_handed_down_until_somebody_wants_usual_ones() {
        let slice = || {
            let told = fs::read_to_string("/proc/thread-self/sched").unwrap_or_default();
            let line = told.lines().find_map(|line| line.strip_prefix("se.slice"));
            line.map(|line| line.trim_start_matches([' ', ':']).to_owned())
        };
        std::thread::spawn(move || {
            let before = slice();
            take_short_turns().unwrap();
            // Older kernels tell of no slices, or have none of one's own.
            if let Some(short) = slice().filter(|_| before != slice()) {
                assert_eq!(short, SHORT_TURN_NANOS.to_string());
            }
            assert_eq!(std::thread::spawn(slice).join().unwrap(), slice());
            take_usual_turns().unwrap();
            assert_eq!(slice(), before);
        })
        .join()
        .unwrap();
    }

    #[test]
    #[cfg(target_env = "gnu")]
    fn what_was_freed_within_the_heap_is_given_back() {
        const BLOCK: usize = 2048;
        let blocks: Vec<Vec<u8>> = (0..(64 << 20) / BLOCK).map(|_| vec![1; BLOCK]).collect();
        let mut freed_memory = FreedMemory::default();
        freed_memory.give_back();
        // One in a hundred stays, the last of all among them.
        let kept: Vec<_> = blocks.into_iter().rev().step_by(100).collect();
        let before = resident();
        freed_memory.give_back();
        assert!(resident() + (32 << 20) < before, "{before} bytes before, {} now", resident());
        drop(kept);
    }

    #[test]
    fn only_what_stands_in_the_program_s_file_is_let_go_of() {
        let smaps = "\
            00400000-00500000 r--p 00000000 fe:00 1    /bin/skep\nSize: 1 kB\nAnonymous:             0 kB\n\
            00500000-00600000 r-xp 00000000 fe:00 1    /bin/skep\nAnonymous:             0 kB\n\
            00600000-00700000 r--p 00000000 fe:00 1    /bin/skep\nAnonymous:            12 kB\n\
            00700000-00800000 rw-p 00000000 fe:00 1    /bin/skep\nAnonymous:             0 kB\n\
            00800000-00900000 r-xp 00000000 fe:00 1    /lib/libc.so\nAnonymous:             0 kB\n";
        assert_eq!(unwritten(smaps, " /bin/skep"), [(0x0040_0000, 0x0050_0000), (0x0050_0000, 0x0060_0000)]);
        let_go_of_code().unwrap();
        let_go_of_code().unwrap();
    }
}
