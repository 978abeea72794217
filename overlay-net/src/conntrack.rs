//! Forgets connections to what is gone, so that their next packet is not sent where nobody is.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use skep_host_net::Netns;
use skep_host_net::nfnetlink::{ACKNOWLEDGE, ERROR, GENERIC_LEN, attributes, messages, open, request, send};
use tokio::sync::Notify;

/// From `linux/netfilter/nfnetlink.h` and `nfnetlink_conntrack.h`.
const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const IP_SOURCE: u16 = 1;
const IP_DESTINATION: u16 = 2;
const IPV6_SOURCE: u16 = 3;
const IPV6_DESTINATION: u16 = 4;
const ANY_FAMILY: u8 = 0;

const DUMP: u16 = 0x300;
const DONE: u16 = 3;
const BUFFER_LEN: usize = 64 << 10;

/// Between two looks at all connections, each of which takes the kernel milliseconds however few there are.
const FORGET_EVERY: Duration = Duration::from_secs(1);

/// Forgets connections beside everything else, of all who are gone by then together.
#[derive(Debug)]
pub(crate) struct Forgetter(Arc<Dead>);

#[derive(Debug, Default)]
struct Dead {
    addresses: Mutex<Addresses>,
    news: Notify,
    hurry: Notify,
    done: Notify,
}

#[derive(Debug, Default)]
struct Addresses {
    /// Whose connections are to go, and whose are just going.
    to_go: BTreeSet<IpAddr>,
    going: BTreeSet<IpAddr>,
    /// Whether no more will come.
    closed: bool,
}

impl Dead {
    fn addresses(&self) -> MutexGuard<'_, Addresses> {
        self.addresses.lock().expect("nobody panics while holding it")
    }

    /// Those whose turn it is now; none once there will be no more.
    async fn next(&self) -> Option<BTreeSet<IpAddr>> {
        loop {
            {
                let mut addresses = self.addresses();
                if !addresses.to_go.is_empty() {
                    addresses.going = std::mem::take(&mut addresses.to_go);
                    return Some(addresses.going.clone());
                }
                if addresses.closed {
                    return None;
                }
            }
            self.news.notified().await;
        }
    }
}

impl Forgetter {
    /// For connections of a namespace.
    pub(crate) fn start(netns: Netns) -> Self {
        let dead = Arc::new(Dead::default());
        let own = dead.clone();
        tokio::spawn(async move {
            while let Some(going) = own.next().await {
                if let Err(error) = netns.run(move || forget(&going)).await {
                    tracing::warn!(%error, "connections to tasks that are gone stay until they end by themselves");
                }
                own.addresses().going.clear();
                own.done.notify_waiters();
                // Waited long enough, or somebody waits: either is as good.
                drop(tokio::time::timeout(FORGET_EVERY, own.hurry.notified()).await);
            }
        });
        Self(dead)
    }

    /// Has the connections of these be forgotten: at once, or up to a second later.
    pub(crate) fn forget(&self, addresses: BTreeSet<IpAddr>) {
        self.0.addresses().to_go.extend(addresses);
        self.0.news.notify_one();
    }

    /// Waits until nothing is left of whoever had these addresses before.
    pub(crate) async fn settled(&self, addresses: &BTreeSet<IpAddr>) {
        loop {
            let done = self.0.done.notified();
            {
                let dead = self.0.addresses();
                if dead.to_go.is_disjoint(addresses) && dead.going.is_disjoint(addresses) {
                    return;
                }
            }
            self.0.hurry.notify_one();
            done.await;
        }
    }
}

impl Drop for Forgetter {
    fn drop(&mut self) {
        self.0.addresses().closed = true;
        self.0.news.notify_one();
        self.0.hurry.notify_one();
    }
}

/// Removes every connection of the calling thread's namespace that one of `addresses` takes part in.
fn forget(addresses: &BTreeSet<IpAddr>) -> io::Result<()> {
    let socket = open()?;
    setsockopt(&socket, sockopt::RcvBuf, &(4 << 20))?;
    let forgotten = forget_through(&socket, addresses);
    skep_host_net::close_in_time(socket);
    forgotten
}

fn forget_through(socket: &OwnedFd, addresses: &BTreeSet<IpAddr>) -> io::Result<()> {
    let doomed = list(socket)?.into_iter().filter(|entry| entry.addresses.iter().any(|a| addresses.contains(a)));
    for entry in doomed {
        delete(socket, &entry)?;
    }
    Ok(())
}

/// One connection: what names it, and who takes part.
struct Entry {
    /// The attribute with the tuple of replies, as the kernel wrote it. The original direction's would
    /// also name a new connection that the client makes from the same port meanwhile.
    replies: Vec<u8>,
    /// Of both, as the kernel numbers it.
    family: u8,
    addresses: Vec<IpAddr>,
}

fn list(socket: &OwnedFd) -> io::Result<Vec<Entry>> {
    send(socket, &request(GET, DUMP, 0, [ANY_FAMILY, 0, 0, 0], &[]))?;
    let mut entries = Vec::new();
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        let len = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        for (kind, body) in messages(&buffer[..len]) {
            match kind {
                DONE => return Ok(entries),
                ERROR => return Err(io::Error::other("the kernel lists no connections")),
                _ => entries.extend(entry(body)),
            }
        }
    }
}

fn delete(socket: &OwnedFd, entry: &Entry) -> io::Result<()> {
    send(socket, &request(DELETE, ACKNOWLEDGE, 0, [entry.family, 0, 0, 0], &entry.replies))?;
    let mut buffer = vec![0; BUFFER_LEN];
    // That it ended by itself meanwhile is just as well.
    recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    Ok(())
}

fn entry(body: &[u8]) -> Option<Entry> {
    let attributes_of_entry = attributes(body.get(GENERIC_LEN..)?);
    let find = |wanted: u16| attributes_of_entry.iter().find(|(kind, ..)| *kind == wanted);
    let (_, replies, _) = find(TUPLE_REPLY)?;
    let mut addresses = Vec::new();
    for (_, _, value) in [find(TUPLE_ORIGINAL), find(TUPLE_REPLY)].into_iter().flatten() {
        for (_, _, ip) in attributes(value).into_iter().filter(|(kind, ..)| *kind == TUPLE_IP) {
            addresses.extend(attributes(ip).into_iter().filter_map(|(kind, _, octets)| address(kind, octets)));
        }
    }
    Some(Entry { replies: replies.to_vec(), family: *body.first()?, addresses })
}

fn address(kind: u16, octets: &[u8]) -> Option<IpAddr> {
    match kind {
        IP_SOURCE | IP_DESTINATION => <[u8; 4]>::try_from(octets).ok().map(IpAddr::from),
        IPV6_SOURCE | IPV6_DESTINATION => <[u8; 16]>::try_from(octets).ok().map(IpAddr::from),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use skep_host_net::nfnetlink::{attribute, nested};

    use super::*;

    #[track_caller]
    fn check(family: u8, kinds: [u16; 2], ends: [&[&[u8]; 2]; 2], want: &str) {
        let ip = |[source, destination]: &[&[u8]; 2]| {
            nested(TUPLE_IP, &[attribute(kinds[0], source), attribute(kinds[1], destination)])
        };
        let original = nested(TUPLE_ORIGINAL, &[ip(ends[0])]);
        let replies = nested(TUPLE_REPLY, &[ip(ends[1])]);
        let body = [vec![family, 0, 0, 0], original, replies.clone()].concat();
        let entry = entry(&body).unwrap();
        assert_eq!((entry.replies, entry.family), (replies, family));
        assert_eq!(entry.addresses.len(), 4);
        assert!(entry.addresses.contains(&want.parse().unwrap()));
        assert!(super::entry(&body[..7]).is_none());
    }

    #[test]
    fn a_connection_is_read_with_both_its_ends() {
        let ends: [&[&[u8]; 2]; 2] = [&[&[10, 0, 0, 1], &[10, 0, 0, 2]], &[&[10, 0, 0, 3], &[10, 0, 0, 1]]];
        check(2, [IP_SOURCE, IP_DESTINATION], ends, "10.0.0.3");
        let [one, two, three] = [1, 2, 3].map(|last| [&[0xfd; 15][..], &[last]].concat());
        let ends: [&[&[u8]; 2]; 2] = [&[&one, &two], &[&three, &one]];
        check(10, [IPV6_SOURCE, IPV6_DESTINATION], ends, "fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fd03");
    }
}
