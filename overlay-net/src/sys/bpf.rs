//! Programs of the kernel's own virtual machine, and the maps that they look into: the `bpf` system call
//! (`linux/bpf.h`).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

/// Its commands.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;

/// `BPF_PROG_TYPE_SCHED_CLS`: sees each packet of a link.
const SCHED_CLS: u32 = 3;
/// What the kernel says of a program that it does not take.
const LOG_LEN_MAX: usize = 64 << 10;

/// What a program sees of a link: kernel 6.6 and later.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// What comes in by it, before anything else sees that (`BPF_TCX_INGRESS`).
    In = 46,
    /// What leaves by it, after everything else (`BPF_TCX_EGRESS`).
    Out = 47,
}

/// How a map keeps its entries.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MapKind {
    /// As many as were written.
    Hash,
    /// One for each number.
    Array,
    /// The oldest make room for new ones.
    Recent,
}

impl MapKind {
    /// Its number, and its flags: a hash allocates as it grows.
    const fn number(self) -> (u32, u32) {
        match self {
            Self::Hash => (1, 1),
            Self::Array => (2, 0),
            Self::Recent => (9, 0),
        }
    }
}

/// A map whose keys have `K` bytes and whose values have `V`.
#[derive(Debug)]
pub(crate) struct Map<const K: usize, const V: usize>(OwnedFd);

#[repr(C)]
#[derive(Default)]
struct MapShape {
    kind: u32,
    key_len: u32,
    value_len: u32,
    entries_max: u32,
    flags: u32,
}

#[repr(C)]
struct MapEntry {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl<const K: usize, const V: usize> Map<K, V> {
    pub(crate) fn new(kind: MapKind, entries_max: u32) -> io::Result<Self> {
        let len = |bytes: usize| u32::try_from(bytes).map_err(io::Error::other);
        let (kind, flags) = kind.number();
        let shape = MapShape { kind, key_len: len(K)?, value_len: len(V)?, entries_max, flags };
        descriptor(call(MAP_CREATE, &shape)?).map(Self)
    }

    pub(crate) fn set(&self, key: &[u8; K], value: &[u8; V]) -> io::Result<()> {
        call(MAP_UPDATE_ELEM, &self.entry(key, value.as_ptr())).map(drop)
    }

    /// Takes an entry away; one that is not there is no error.
    pub(crate) fn remove(&self, key: &[u8; K]) -> io::Result<()> {
        match call(MAP_DELETE_ELEM, &self.entry(key, std::ptr::null())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// What programs name it by.
    pub(crate) fn number(&self) -> i32 {
        self.0.as_raw_fd()
    }

    fn entry(&self, key: &[u8; K], value: *const u8) -> MapEntry {
        let map = self.0.as_raw_fd().cast_unsigned();
        MapEntry { map, pad: 0, key: address(key.as_ptr()), value: address(value), flags: 0 }
    }
}

#[repr(C)]
struct ProgramToLoad {
    kind: u32,
    instructions_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_len: u32,
    log: u64,
}

/// A program that the kernel has checked.
#[derive(Debug)]
pub(crate) struct Program(OwnedFd);

impl Program {
    /// Hands the kernel a program; what it has against it is in the error.
    pub(crate) fn load(instructions: &[u64]) -> io::Result<Self> {
        /// It calls nothing that is kept for programs under other licenses.
        const LICENSE: &CStr = c"Apache-2.0";
        let mut log = vec![0_u8; LOG_LEN_MAX];
        let to_load = ProgramToLoad {
            kind: SCHED_CLS,
            instructions_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
            instructions: address(instructions.as_ptr()),
            license: address(LICENSE.as_ptr()),
            log_level: 1,
            log_len: u32::try_from(log.len()).map_err(io::Error::other)?,
            log: address(log.as_mut_ptr()),
        };
        let loaded = call(PROG_LOAD, &to_load).map_err(|error| {
            let said = String::from_utf8_lossy(&log);
            let last = said.trim_end_matches('\0').lines().rev().take(3).collect::<Vec<_>>().join("; ");
            if last.is_empty() { error } else { io::Error::new(error.kind(), format!("{error}: {last}")) }
        })?;
        descriptor(loaded).map(Self)
    }

    /// Lets it see packets of a link of the calling thread's namespace, as long as the result is kept.
    pub(crate) fn attach(&self, link: u32, place: Place) -> io::Result<OwnedFd> {
        #[repr(C)]
        struct Attachment {
            program: u32,
            link: u32,
            place: u32,
            flags: u32,
            beside: [u64; 2],
        }
        let program = self.0.as_raw_fd().cast_unsigned();
        let attached = call(LINK_CREATE, &Attachment { program, link, place: place as u32, flags: 0, beside: [0; 2] })?;
        descriptor(attached)
    }
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

fn call<T>(command: libc::c_int, attributes: &T) -> io::Result<i64> {
    let len = size_of::<T>();
    // SAFETY: the kernel reads `len` bytes of `attributes`, and what they point to, which outlives the call: keys and
    // values of the lengths that their map was made with, and a program and its log of the lengths that are said.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn descriptor(number: i64) -> io::Result<OwnedFd> {
    let number = i32::try_from(number).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
