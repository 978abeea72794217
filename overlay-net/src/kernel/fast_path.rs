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
use std::sync::Arc;

use skep_api::NetworkId;
use skep_host_net::Netns;

use super::links::Links;
use super::{Mtu, next_hop, next_hop_v6, set_all};
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
    pub(super) async fn set(&mut self, links: &Links, out: Out, wanted: &FastPathState) {
        let idle = wanted.locals.is_empty() || wanted.remotes.is_empty();
        let set = match self {
            Self::Absent => return,
            Self::Idle if idle => return,
            Self::Idle => Loaded::new(links.netns()).await.map(|loaded| *self = Self::Loaded(Box::new(loaded))),
            Self::Loaded(_) => Ok(()),
        };
        let set = match (set, &mut *self) {
            (Ok(()), Self::Loaded(loaded)) => loaded.set(links, out, wanted).await,
            (set, _) => set,
        };
        if let Err(error) = set {
            tracing::info!(
                %error,
                "this kernel has no fast path between containers (6.6 and later have): packets take the long way"
            );
            *self = Self::Absent;
        }
    }
}

/// The links to other nodes, as far as they are there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Out {
    pub(super) tunnel: Option<u32>,
    pub(super) plain: Option<u32>,
    pub(super) mtu: Mtu,
}

/// What was loaded into the kernel, and what was written there.
#[derive(Debug)]
pub(crate) struct Loaded {
    locals: Map<LOCAL_KEY_LEN, LOCAL_LEN>,
    remotes: Map<REMOTE_KEY_LEN, REMOTE_LEN>,
    epochs: Map<4, 8>,
    epoch: u64,
    programs: Arc<Programs>,
    /// Where programs are attached, by link.
    attached: BTreeMap<u32, Vec<OwnedFd>>,
    applied: Resolved,
}

#[derive(Debug)]
struct Programs {
    leaving: Program,
    learning: Program,
    arriving: Program,
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
    /// What is not there, or has no room, is left out.
    async fn of(wanted: &FastPathState, links: &Links, Out { tunnel, plain, mtu }: Out) -> Self {
        let mut locals = BTreeMap::new();
        for ((link, address), network) in wanted.locals.iter().take(LOCALS_MAX as usize) {
            if let Some(number) = links.number(link).await {
                locals.insert((number, *address), *network);
            }
        }
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
        let remotes = remotes.take(REMOTES_MAX as usize).collect();
        Self { locals, remotes, out: [tunnel, plain].into_iter().flatten().collect() }
    }

    fn links(&self) -> BTreeSet<u32> {
        self.locals.keys().map(|(link, _)| *link).chain(self.out.iter().copied()).collect()
    }
}

impl Programs {
    /// Has a link of the calling thread's namespace be seen.
    fn attach(&self, link: u32, leads_out: bool) -> io::Result<Vec<OwnedFd>> {
        let programs: &[(&Program, bpf::Place)] = if leads_out {
            &[(&self.arriving, bpf::Place::In), (&self.learning, bpf::Place::Out)]
        } else {
            &[(&self.leaving, bpf::Place::In)]
        };
        let attached = programs.iter().map(|(program, place)| program.attach(link, *place)).collect();
        match attached {
            // Its container has just ended.
            Err(error) if io::Error::raw_os_error(&error) == Some(libc::ENODEV) => Ok(Vec::new()),
            attached => attached,
        }
    }
}

impl Loaded {
    /// For a namespace whose rules are in force.
    async fn new(netns: &Netns) -> io::Result<Self> {
        // The rules see the beginning and the end of a connection, and are to know them for that.
        netns.run(|| set_all(&[("net/netfilter/nf_conntrack_tcp_be_liberal", "1")])).await?;
        let locals = Map::new(MapKind::Hash, LOCALS_MAX)?;
        let remotes = Map::new(MapKind::Hash, REMOTES_MAX)?;
        // Programs alone look into these, and keep them.
        let flows: Map<FLOW_KEY_LEN, FLOW_LEN> = Map::new(MapKind::Recent, FLOWS_MAX)?;
        let epochs = Map::new(MapKind::Array, 1)?;
        let maps =
            Maps { locals: locals.number(), remotes: remotes.number(), flows: flows.number(), epoch: epochs.number() };
        let programs = Programs {
            leaving: Program::load(&program::leaving(maps))?,
            learning: Program::load(&program::learning(maps))?,
            arriving: Program::load(&program::arriving(maps))?,
        };
        Ok(Self {
            locals,
            remotes,
            epochs,
            epoch: 0,
            programs: Arc::new(programs),
            attached: BTreeMap::new(),
            applied: Resolved::default(),
        })
    }

    /// Brings maps and links in line.
    async fn set(&mut self, links: &Links, out: Out, wanted: &FastPathState) -> io::Result<()> {
        let wanted = Resolved::of(wanted, links, out).await;
        if wanted == self.applied {
            return Ok(());
        }
        self.write(&wanted)?;
        self.applied = wanted;
        let seen = self.applied.links();
        self.attached.retain(|link, _| seen.contains(link));
        let new: Vec<(u32, bool)> = seen
            .into_iter()
            .filter(|link| !self.attached.contains_key(link))
            .map(|link| (link, self.applied.out.contains(&link)))
            .collect();
        if !new.is_empty() {
            let programs = self.programs.clone();
            let attach = move |&(link, leads_out): &(u32, bool)| Ok((link, programs.attach(link, leads_out)?));
            let attached = links.netns().run(move || new.iter().map(attach).collect::<io::Result<Vec<_>>>());
            self.attached.extend(attached.await?);
        }
        Ok(())
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
