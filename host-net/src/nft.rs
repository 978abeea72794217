//! Rules for packets, through `nft`.

use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

/// Applies a script in the calling thread's namespace, all of it or nothing.
pub fn apply(script: &str) -> io::Result<()> {
    let spawned = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut nft = spawned.map_err(|error| {
        io::Error::new(error.kind(), format!("nft cannot be run, install the nftables package: {error}"))
    })?;
    if let Some(mut stdin) = nft.stdin.take() {
        stdin.write_all(script.as_bytes())?;
    }
    let output = nft.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("nft refused the rules: {}", String::from_utf8_lossy(&output.stderr))))
}

/// NFNLGRP_NFTABLES of linux/netfilter/nfnetlink.h.
const CHANGES_GROUP: u32 = 7;

/// A socket that becomes readable when rules of the calling thread's namespace have changed, whoever
/// changed them.
pub fn changes() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let protocol = SockProtocol::NetlinkNetFilter;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1 << (CHANGES_GROUP - 1)))?;
    Ok(socket)
}

/// Takes what has come to a socket of [`changes`]: that something has changed is all that counts.
pub fn drain_changes(socket: &OwnedFd) {
    let mut buffer = [0; 8192];
    // More than fits is told as an error, once.
    while matches!(recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()), Ok(_) | Err(Errno::ENOBUFS)) {}
}

/// Whether a table (`family name`) is in the calling thread's namespace.
pub fn has_table(table: &str) -> io::Result<bool> {
    let output = Command::new("nft").args(["list", "tables"]).output()?;
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    let wanted = format!("table {table}");
    Ok(String::from_utf8_lossy(&output.stdout).lines().any(|line| line == wanted))
}

/// How the kernel shows a table (`family name`) of the calling thread's namespace.
pub fn show(table: &str) -> io::Result<String> {
    let output = Command::new("nft").args(["-n", "list", "table"]).args(table.split(' ')).output()?;
    if output.status.success() {
        return String::from_utf8(output.stdout).map_err(io::Error::other);
    }
    Err(io::Error::other(format!("nft shows no table {table}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}
