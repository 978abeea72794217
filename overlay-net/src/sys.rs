//! The system calls that need `unsafe`, or that the crates at hand do not wrap.

#![expect(unsafe_code, reason = "this is the one place of the crate for it; one operation a block")]

pub(crate) mod bpf;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;

/// From `linux/if_tun.h`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;

/// Makes the TAP device `name` in the calling thread's namespace; it is gone once the file is
/// closed, and never waits. Frames have a virtio header in front, and the kernel leaves cutting and checksums to us
/// as far as it can.
pub(crate) fn open_tap(name: &str) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: all bits zero is a valid request, which only holds numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    // SAFETY: the request lives until the call is over; the kernel reads and writes within it.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let without_udp = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6;
    // Kernels before 6.2 know no segmentation of UDP.
    for offload in [without_udp | TUN_F_USO4 | TUN_F_USO6, without_udp] {
        // SAFETY: the call takes numbers alone.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, offload) } == 0 {
            return Ok(file);
        }
    }
    Err(io::Error::last_os_error())
}
