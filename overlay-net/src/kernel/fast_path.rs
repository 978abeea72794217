//! The fast path: packets between containers of different nodes are handed from link to link by a program of the
//! kernel's, past routes, rules and the queue of one more link, once the rules have let a connection's first ones pass
//! ([ADR 32](../../../docs/adr/0032-hand-known-flows-from-link-to-link.md)).
//!
//! Nothing depends on it: what no program takes goes through the rules, and is taken by them as if there were none. So
//! it is there while the daemon is, and where the kernel can do it (6.6 and later).

mod assembler;
mod program;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use nix::net::if_::if_nametoindex;
use skep_api::NetworkId;
use skep_host_net::Netns;

use super::{Mtu, next_hop, next_hop_v6, plain, set_all};
use crate::path::DEVICE;
use crate::path::message::PeerIndex;
use crate::path::peers::BY_ADDRESS;
use crate::sys::bpf::{self, Map, MapKind, Program};
use program::{
    FLOW_KEY_LEN, FLOW_LEN, LOCAL_KEY_LEN, LOCAL_LEN, Maps, REMOTE_KEY_LEN, REMOTE_LEN, Remote, local, local_key,
    remote_key,
};

/// Of containers here; who has no room takes the long way.
const LOCALS_MAX: u32 = 16_384;
/// Of other nodes; likewise.
const REMOTES_MAX: u32 = 65_536;
/// The oldest flows make room for new ones: 3 MB.
const FLOWS_MAX: u32 = 16_384;

/// Who may speak to whom by the fast path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FastPathState {
    /// What containers here have, by link.
    pub(crate) locals: BTreeMap<(String, IpAddr), NetworkId>,
    /// What other nodes have.
    pub(crate) remotes: BTreeMap<IpAddr, (NetworkId, Via)>,
}

/// How an address of another node's is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    /// Through the data path, which knows whose it is.
    Tunnel,
    /// Through the kernel's VXLAN, by the node.
    Plain(PeerIndex),
}

/// The fast path, as far as there is one.
#[derive(Debug, Default)]
pub(crate) enum FastPath {
    /// Nobody has needed it yet.
    #[default]
    Idle,
    Loaded(Box<Loaded>),
    /// The kernel cannot do it.
    Absent,
}

impl FastPath {
    /// Which way packets between containers of two nodes take, if there are such.
    pub(super) const fn way(&self) -> Option<&'static str> {
        match self {
            Self::Idle => None,
            Self::Loaded(_) => Some("packets of known flows take the fast path past the rules"),
            Self::Absent => {
                Some("all packets pass through the rules: this kernel has no fast path (6.6 and later have)")
            }
        }
    }

    /// Brings it in line. What fails is said, and everything takes the long way.
    pub(super) async fn set(&mut self, netns: &Netns, mtu: Mtu, wanted: &FastPathState) {
        let idle = wanted.locals.is_empty() || wanted.remotes.is_empty();
        let loaded = match std::mem::take(self) {
            Self::Idle if idle => return,
            Self::Absent => {
                *self = Self::Absent;
                return;
            }
            Self::Idle => None,
            Self::Loaded(loaded) => Some(loaded),
        };
        let wanted = wanted.clone();
        let set = netns.run(move || {
            let mut loaded = match loaded {
                Some(loaded) => loaded,
                None => Box::new(Loaded::new()?),
            };
            loaded.set(mtu, &wanted)?;
            Ok(loaded)
        });
        *self = match set.await {
            Ok(loaded) => Self::Loaded(loaded),
            Err(error) => {
                tracing::info!(
                    %error,
                    "this kernel has no fast path between containers (6.6 and later have): packets take the long way"
                );
                Self::Absent
            }
        };
    }
}

/// What was loaded into the kernel, and what was written there.
#[derive(Debug)]
pub(crate) struct Loaded {
    locals: Map<LOCAL_KEY_LEN, LOCAL_LEN>,
    remotes: Map<REMOTE_KEY_LEN, REMOTE_LEN>,
    /// Programs alone look into it.
    _flows: Map<FLOW_KEY_LEN, FLOW_LEN>,
    epochs: Map<4, 8>,
    epoch: u64,
    leaving: Program,
    learning: Program,
    arriving: Program,
    /// Where programs are attached, by link.
    attached: BTreeMap<u32, Vec<OwnedFd>>,
    applied: Resolved,
}

/// A state with its links' numbers.
#[derive(Debug, Default, PartialEq, Eq)]
struct Resolved {
    locals: BTreeMap<(u32, IpAddr), NetworkId>,
    remotes: BTreeMap<IpAddr, Remote>,
    /// The links to other nodes.
    out: BTreeSet<u32>,
}

impl Resolved {
    /// In the calling thread's namespace. What is not there, or has no room, is left out.
    fn of(wanted: &FastPathState, mtu: Mtu) -> Self {
        let number = |name: &str| if_nametoindex(name).ok();
        let (tunnel, plain) = (number(DEVICE), number(plain::DEVICE));
        let locals =
            wanted.locals.iter().filter_map(|((link, address), network)| Some(((number(link)?, *address), *network)));
        let remotes = wanted.remotes.iter().filter_map(|(&address, &(network, via))| {
            let (link, peer, mtu_bytes) = match via {
                Via::Tunnel => (tunnel?, BY_ADDRESS, mtu.tunnel_bytes),
                Via::Plain(peer) => (plain?, peer, mtu.plain_bytes),
            };
            let next_hop = match address {
                IpAddr::V4(_) => next_hop(peer).into(),
                IpAddr::V6(_) => next_hop_v6(peer).into(),
            };
            Some((address, Remote { network, link, next_hop, mtu_bytes, connections_only: via == Via::Tunnel }))
        });
        Self {
            locals: locals.take(LOCALS_MAX as usize).collect(),
            remotes: remotes.take(REMOTES_MAX as usize).collect(),
            out: [tunnel, plain].into_iter().flatten().collect(),
        }
    }
}

impl Loaded {
    /// In the calling thread's namespace, whose rules are in force.
    fn new() -> io::Result<Self> {
        // What passes by the rules is missing where they look for it: a connection's end is to be known all the same.
        set_all(&[("net/netfilter/nf_conntrack_tcp_be_liberal", "1")])?;
        let locals = Map::new(MapKind::Hash, LOCALS_MAX)?;
        let remotes = Map::new(MapKind::Hash, REMOTES_MAX)?;
        let flows: Map<FLOW_KEY_LEN, FLOW_LEN> = Map::new(MapKind::Recent, FLOWS_MAX)?;
        let epochs = Map::new(MapKind::Array, 1)?;
        let maps =
            Maps { locals: locals.number(), remotes: remotes.number(), flows: flows.number(), epoch: epochs.number() };
        Ok(Self {
            leaving: Program::load(&program::leaving(maps))?,
            learning: Program::load(&program::learning(maps))?,
            arriving: Program::load(&program::arriving(maps))?,
            locals,
            remotes,
            _flows: flows,
            epochs,
            epoch: 0,
            attached: BTreeMap::new(),
            applied: Resolved::default(),
        })
    }

    /// Brings maps and links in line, in the calling thread's namespace.
    fn set(&mut self, mtu: Mtu, wanted: &FastPathState) -> io::Result<()> {
        let wanted = Resolved::of(wanted, mtu);
        let attached: BTreeSet<u32> = wanted.locals.keys().map(|(link, _)| *link).chain(wanted.out.clone()).collect();
        self.attached.retain(|link, _| attached.contains(link));
        if wanted != self.applied {
            self.write(&wanted)?;
            self.applied = wanted;
        }
        for link in attached {
            if !self.attached.contains_key(&link) {
                match self.attach(link) {
                    Ok(attached) => drop(self.attached.insert(link, attached)),
                    // Its container has just ended.
                    Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn attach(&self, link: u32) -> io::Result<Vec<OwnedFd>> {
        let programs: &[(&Program, bpf::Place)] = if self.applied.out.contains(&link) {
            &[(&self.arriving, bpf::Place::In), (&self.learning, bpf::Place::Out)]
        } else {
            &[(&self.leaving, bpf::Place::In)]
        };
        programs.iter().map(|(program, place)| program.attach(link, *place)).collect()
    }

    fn write(&mut self, wanted: &Resolved) -> io::Result<()> {
        let mut taken = false;
        for (key @ (link, address), network) in &self.applied.locals {
            if wanted.locals.get(key) != Some(network) {
                self.locals.remove(&local_key(*link, *address))?;
                taken = true;
            }
        }
        for (address, remote) in &self.applied.remotes {
            if wanted.remotes.get(address) != Some(remote) {
                self.remotes.remove(&remote_key(*address))?;
                taken = true;
            }
        }
        if taken {
            // What was learnt of them is forgotten with all the rest, which is learnt anew.
            self.epoch += 1;
            self.epochs.set(&0_u32.to_ne_bytes(), &self.epoch.to_ne_bytes())?;
        }
        for (key @ (link, address), network) in &wanted.locals {
            if self.applied.locals.get(key) != Some(network) {
                self.locals.set(&local_key(*link, *address), &local(*network))?;
            }
        }
        for (address, remote) in &wanted.remotes {
            if self.applied.remotes.get(address) != Some(remote) {
                self.remotes.set(&remote_key(*address), &remote.bytes())?;
            }
        }
        Ok(())
    }
}
