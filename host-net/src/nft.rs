//! Rules for packets, through `nft`.

use std::collections::BTreeSet;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::process::{Child, Command, Stdio};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket, sockopt,
};

use crate::nfnetlink::{GENERIC_LEN, attributes, messages, told};

/// Applies a script in the calling thread's namespace, all of it or nothing; returns once it is in force. What is
/// returned tells its doings from others': see [`RuleWatch`].
pub fn apply(script: &str) -> io::Result<u32> {
    // Where the kernel does not tell, the end of the program does.
    let told = changes().ok();
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
    if let Some(told) = told {
        let in_force = is_told_of(&told, &nft);
        close_in_time(told);
        if in_force {
            let port = nft.id();
            in_the_background(move || drop(nft.wait()));
            return Ok(port);
        }
    }
    // A program's first socket has its own number for a port.
    let port = nft.id();
    let output = nft.wait_with_output()?;
    if output.status.success() {
        return Ok(port);
    }
    Err(io::Error::other(format!("nft refused the rules: {}", String::from_utf8_lossy(&output.stderr))))
}

/// Closes a socket to the packet filter. The kernel first clears away what rules were replaced before, which takes
/// tens of milliseconds: nobody waits for that.
pub fn close_in_time(socket: OwnedFd) {
    in_the_background(move || drop(socket));
}

fn in_the_background(work: impl FnOnce() + Send + 'static) {
    // Without a thread it is done here and now, as what it has is let go of.
    drop(std::thread::Builder::new().name("nft".into()).spawn(work));
}

/// Waits until the kernel tells that what `nft` asked for is in force. It is not told of if the program says
/// something, or ends.
fn is_told_of(told: &OwnedFd, nft: &Child) -> bool {
    let Some(says) = &nft.stderr else { return false };
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut waited = [told.as_fd(), says.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut waited, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(_) => return false,
        }
        let [told_now, says_now] = waited.map(|waited| waited.any().unwrap_or(false));
        if told_now {
            match recv(told.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(len) if messages(&buffer[..len]).iter().any(|&message| is_commit_of(message, nft.id())) => {
                    return true;
                }
                Ok(_) => {}
                // More was told than fits.
                Err(_) => return false,
            }
        } else if says_now {
            return false;
        }
    }
}

/// Whether a message says that what a process asked for is in force.
fn is_commit_of((kind, body): (u16, &[u8]), process: u32) -> bool {
    let attributes = attributes(body.get(GENERIC_LEN..).unwrap_or_default());
    let by = attributes.iter().find(|(kind, ..)| *kind == GENERATION_PROCESS);
    kind == NEW_GENERATION && by.is_some_and(|(_, _, value)| *value == process.to_be_bytes())
}

/// NFT_MSG_NEWGEN of subsystem NFNL_SUBSYS_NFTABLES, and NFTA_GEN_PROC_PID, of linux/netfilter/nf_tables.h.
const NEW_GENERATION: u16 = 10 << 8 | 15;
const GENERATION_PROCESS: u16 = 2;
/// How much a watch holds until it is asked, in bytes.
const WATCHED_LEN_MAX: usize = 16 << 20;
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

/// Takes what has come to a socket of [`changes`]; says whether anything had.
pub fn drain_changes(socket: &OwnedFd) -> bool {
    let mut buffer = [0; 8192];
    let mut any = false;
    // More than fits is told as an error, once.
    while matches!(recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()), Ok(_) | Err(Errno::ENOBUFS)) {
        any = true;
    }
    any
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

/// What is in a table (`family name`) of the calling thread's namespace, in JSON (libnftables-json(5)); none if there is
/// no such table.
pub fn list_table(table: &str) -> io::Result<Option<String>> {
    let output = Command::new("nft").args(["-j", "list", "table"]).args(table.split(' ')).output()?;
    if output.status.success() {
        return String::from_utf8(output.stdout).map(Some).map_err(io::Error::other);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("No such file or directory") {
        return Ok(None);
    }
    Err(io::Error::other(format!("nft does not list table {table}: {said}")))
}

/// Tells whether somebody else changed a table.
#[derive(Debug)]
pub struct RuleWatch {
    told: OwnedFd,
    table: &'static str,
    /// Whose doings are ours: a connection's, always, and those of programs, until they were seen.
    own: u32,
    programs: BTreeSet<u32>,
}

impl RuleWatch {
    /// Watches a table of that name, of any family, of the calling thread's namespace; `own` is the port of who may
    /// change it.
    pub fn open(table: &'static str, own: u32) -> io::Result<Self> {
        let told = changes()?;
        // All elements of large sets are told of, one by one.
        setsockopt(&told, sockopt::RcvBufForce, &WATCHED_LEN_MAX)?;
        Ok(Self { told, table, own, programs: BTreeSet::new() })
    }

    /// What a program did that [`apply`] ran is our own doing.
    pub fn expect(&mut self, program: u32) {
        self.programs.insert(program);
    }

    /// Whether anybody else has touched the table since this was asked last.
    pub fn touched_by_others(&mut self) -> bool {
        let mut buffer = vec![0; 64 << 10];
        let mut touched = false;
        loop {
            match recv(self.told.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(len) => touched |= told(&buffer[..len]).iter().any(|&message| self.is_others(message)),
                Err(Errno::EINTR) => {}
                // More was told than fits: by our own doing, if there was any.
                Err(Errno::ENOBUFS) => touched |= self.programs.is_empty(),
                Err(_) => break,
            }
        }
        self.programs.clear();
        touched
    }

    fn is_others(&self, (kind, port, body): (u16, u32, &[u8])) -> bool {
        if kind == NEW_GENERATION || port == self.own || self.programs.contains(&port) {
            return false;
        }
        // The first attribute of what is told of tables, and of all that is in them, is the table's name.
        let attributes = attributes(body.get(GENERIC_LEN..).unwrap_or_default());
        let table = attributes.iter().find(|(kind, ..)| *kind == 1);
        table.is_some_and(|(_, _, name)| name.strip_suffix(&[0]) == Some(self.table.as_bytes()))
    }
}
