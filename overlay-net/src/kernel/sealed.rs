//! Ways through the kernel's own WireGuard, where both hosts have it: packets between containers then pass
//! no process. Nothing depends on it: the tunnels of the data path are always there, and packets for a
//! peer pass through them unless this device is known to reach it. To know that takes a daemon: while it is
//! away, the data path's process leads all packets to itself.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant, SystemTime};

use futures::TryStreamExt as _;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteScope};
use rtnetlink::{Handle, LinkUnspec, LinkWireguard, RouteMessageBuilder};
use skep_api::SecretBytes;
use skep_host_net::wireguard::{DeviceStatus, Key, PeerStatus, WireGuard};
use skep_host_net::{Netlink, Netns, allow_ipv6_in, has_ipv6, link_index};

use crate::path::message::PeerIndex;

pub(crate) const DEVICE: &str = "wireguard0";
/// How often a peer is sent something at least.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// A peer that is there answers data within ten seconds, with an empty packet if with nothing else.
const ANSWER_LIMIT: Duration = Duration::from_secs(12);
/// What WireGuard takes as the end of a session.
const SESSION_LIMIT: Duration = Duration::from_secs(180);
/// An empty packet's length, sealed.
const EMPTY_LEN: u64 = 32;
/// Addresses that are nobody's any more are given to this peer, and go with it: to take single ones from a peer is
/// what older kernels cannot.
const NOBODY: Key = [0x5b; 32];

/// Whether this host's kernel has WireGuard; its module is loaded for that.
pub async fn has_kernel_wireguard() -> bool {
    WireGuard::open().await.is_ok_and(|opened| opened.is_some())
}

/// What the kernel's WireGuard should know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SealedState {
    /// This node's private key; none: the device is not needed, or not to be had.
    pub(crate) key: Option<SecretBytes>,
    /// UDP.
    pub(crate) port: u16,
    pub(crate) peers: BTreeMap<PeerIndex, SealedPeer>,
    /// Whose addresses of other nodes' tasks are.
    pub(crate) addresses: BTreeMap<IpAddr, PeerIndex>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SealedPeer {
    pub(crate) key: Key,
    pub(crate) endpoint: SocketAddr,
}

impl SealedState {
    fn addresses_of(&self, index: PeerIndex) -> BTreeSet<IpAddr> {
        self.addresses.iter().filter(|(_, holder)| **holder == index).map(|(address, _)| *address).collect()
    }
}

/// The device, what it was told, and which peers it reaches.
#[derive(Default)]
pub(crate) struct Sealed {
    device: Option<Device>,
    applied: SealedState,
    /// What is led through the device.
    led: BTreeSet<IpAddr>,
}

struct Device {
    index: u32,
    wireguard: WireGuard,
    /// Since when the key is in use: sessions from before are none.
    keyed: SystemTime,
    heard: BTreeMap<PeerIndex, Heard>,
}

/// What was heard of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Heard {
    received_bytes: u64,
    sent_bytes: u64,
    /// Since when it was sent something and sent nothing.
    unanswered: Option<Instant>,
    reached: bool,
}

impl Heard {
    /// What is known now, after another look; `before` is absent at the first.
    fn after(
        before: Option<&Self>,
        status: &PeerStatus,
        keyed: SystemTime,
        (now, today): (Instant, SystemTime),
    ) -> Self {
        let unanswered = before.and_then(|before| {
            let answered = status.received_bytes != before.received_bytes;
            let sent = status.sent_bytes.saturating_sub(before.sent_bytes);
            // An empty packet asks for no answer.
            let asked = (sent != 0 && sent != EMPTY_LEN).then_some(now);
            before.unanswered.or(asked).filter(|_| !answered)
        });
        let in_session = status
            .last_handshake
            .is_some_and(|at| at >= keyed && today.duration_since(at).is_ok_and(|age| age < SESSION_LIMIT));
        let silent = unanswered.is_some_and(|since| now.duration_since(since) >= ANSWER_LIMIT);
        let (received_bytes, sent_bytes) = (status.received_bytes, status.sent_bytes);
        Self { received_bytes, sent_bytes, unanswered, reached: in_session && !silent }
    }
}

impl Sealed {
    /// Brings the device in line: made when it is needed first, gone when it is not.
    pub(crate) async fn set(
        &mut self,
        inside: &Netlink,
        netns: &Netns,
        mtu_bytes: u32,
        wanted: SealedState,
    ) -> io::Result<()> {
        let Some(key) = &wanted.key else {
            if let Some(index) = link_index(inside.handle(), DEVICE).await {
                inside.handle().link().del(index).execute().await.map_err(io::Error::other)?;
            }
            *self = Self::default();
            return Ok(());
        };
        if self.applied == wanted {
            return Ok(());
        }
        let key = Key::try_from(key.expose()).map_err(|_| io::Error::other("the node's key is none of WireGuard's"))?;
        if self.device.is_none() {
            self.take_up(inside, netns, mtu_bytes, &wanted).await?;
        }
        // Whatever is about to change is led by the tunnels of the data path meanwhile.
        let (before, device) = (&self.applied, self.device.as_mut().ok_or_else(gone)?);
        let same_key = before.key == wanted.key;
        device.heard.retain(|index, _| same_key && before.peers.get(index) == wanted.peers.get(index));
        let kept = before.addresses.iter().filter(|(address, index)| wanted.addresses.get(address) == Some(index));
        let kept: BTreeMap<IpAddr, PeerIndex> = kept.map(|(address, index)| (*address, *index)).collect();
        lead(inside.handle(), device, &mut self.led, &kept).await?;
        if !same_key || before.port != wanted.port {
            device.wireguard.set_up(DEVICE, key, wanted.port).await?;
            device.keyed = SystemTime::now();
        }
        let up = LinkUnspec::new_with_index(device.index).mtu(mtu_bytes).up().build();
        inside.handle().link().set(up).execute().await.map_err(|error| {
            io::Error::other(format!("UDP port {} for the kernel's WireGuard cannot be used: {error}", wanted.port))
        })?;
        device.tell(before, &wanted).await?;
        lead(inside.handle(), device, &mut self.led, &wanted.addresses).await?;
        self.applied = wanted;
        Ok(())
    }

    /// Looks which peers the device reaches, and leads packets accordingly.
    pub(crate) async fn look(&mut self, inside: &Netlink) -> io::Result<()> {
        let Some(device) = &mut self.device else { return Ok(()) };
        let there = link_index(inside.handle(), DEVICE).await;
        if there != Some(device.index) {
            return Err(gone());
        }
        let status = device.wireguard.status(DEVICE).await?;
        let at = (Instant::now(), SystemTime::now());
        for (&index, peer) in &self.applied.peers {
            let Some(status) = status.peers.iter().find(|status| status.public_key == peer.key) else {
                return Err(io::Error::other("the kernel's WireGuard has lost a peer"));
            };
            let heard = Heard::after(device.heard.get(&index), status, device.keyed, at);
            device.heard.insert(index, heard);
        }
        lead(inside.handle(), device, &mut self.led, &self.applied.addresses).await
    }

    /// The peers it should reach, and whether it does.
    pub(crate) fn reached(&self) -> BTreeMap<PeerIndex, bool> {
        let heard = self.device.as_ref().map(|device| &device.heard);
        let reached = |index| heard.and_then(|heard| heard.get(index)).is_some_and(|heard| heard.reached);
        self.applied.peers.keys().map(|index| (*index, reached(index))).collect()
    }

    /// Makes the device, or finds the one that a daemon before left, with what it was told.
    async fn take_up(
        &mut self,
        inside: &Netlink,
        netns: &Netns,
        mtu_bytes: u32,
        wanted: &SealedState,
    ) -> io::Result<()> {
        let wireguard = WireGuard::open_in(netns).await?;
        let mut wireguard = wireguard.ok_or_else(|| io::Error::other("the kernel's WireGuard is gone"))?;
        if link_index(inside.handle(), DEVICE).await.is_none() {
            // Its own packets pass through the namespace where it is asked for.
            let device = LinkWireguard::new(DEVICE).mtu(mtu_bytes).setns_by_fd(netns.as_raw_fd()).build();
            Netlink::open()?.handle().link().add(device).execute().await.map_err(io::Error::other)?;
        }
        let index = link_index(inside.handle(), DEVICE).await.ok_or_else(gone)?;
        if has_ipv6() {
            allow_ipv6_in(netns, DEVICE.to_owned()).await?;
        }
        let status = wireguard.status(DEVICE).await?;
        for left in status.peers.iter().filter(|left| !wanted.peers.values().any(|peer| peer.key == left.public_key)) {
            wireguard.remove_peer(DEVICE, left.public_key).await?;
        }
        self.led = status.peers.iter().flat_map(|peer| peer.addresses.iter().copied()).collect();
        self.applied = told(&status, wanted);
        self.device = Some(Device { index, wireguard, keyed: SystemTime::UNIX_EPOCH, heard: BTreeMap::new() });
        Ok(())
    }
}

impl Device {
    async fn tell(&mut self, before: &SealedState, wanted: &SealedState) -> io::Result<()> {
        let taken = before.addresses.keys().filter(|address| !wanted.addresses.contains_key(address));
        let taken: Vec<IpAddr> = taken.copied().collect();
        if !taken.is_empty() {
            self.wireguard.add_peer(DEVICE, (NOBODY, None), Duration::ZERO, &taken).await?;
            self.wireguard.remove_peer(DEVICE, NOBODY).await?;
        }
        for peer in before.peers.values().filter(|peer| !wanted.peers.values().any(|next| next.key == peer.key)) {
            self.wireguard.remove_peer(DEVICE, peer.key).await?;
        }
        for (&index, peer) in &wanted.peers {
            let (had, has) = (before.addresses_of(index), wanted.addresses_of(index));
            let same = before.peers.get(&index) == Some(peer);
            // A peer that is new to the device has no addresses there yet.
            let new: Vec<IpAddr> =
                if same { has.difference(&had).copied().collect() } else { has.into_iter().collect() };
            if !same || !new.is_empty() {
                let endpoint = Some(peer.endpoint).filter(|_| !same);
                self.wireguard.add_peer(DEVICE, (peer.key, endpoint), KEEPALIVE, &new).await?;
            }
        }
        Ok(())
    }
}

/// What a device was told, in the numbers of `wanted`.
fn told(status: &DeviceStatus, wanted: &SealedState) -> SealedState {
    let mut told =
        SealedState { key: status.private_key.map(|key| SecretBytes::new(key.to_vec())), ..Default::default() };
    if told.key == wanted.key {
        // It listens where it did.
        told.port = wanted.port;
    }
    for (&index, peer) in &wanted.peers {
        let Some(known) = status.peers.iter().find(|known| known.public_key == peer.key) else { continue };
        // Where it was seen last is where it is spoken to.
        told.peers.insert(index, SealedPeer { key: peer.key, endpoint: peer.endpoint });
        told.addresses.extend(known.addresses.iter().map(|address| (*address, index)));
    }
    told
}

/// Leads nothing through the device any more, whoever does until now; what peers send is still taken.
pub(crate) async fn let_go(netns: &Netns) -> io::Result<()> {
    let inside = Netlink::open_in(netns).await?;
    let Some(index) = link_index(inside.handle(), DEVICE).await else { return Ok(()) };
    for any in [route(index, Ipv4Addr::UNSPECIFIED.into()), route(index, Ipv6Addr::UNSPECIFIED.into())] {
        let mut all = inside.handle().route().get(any).execute();
        while let Some(route) = all.try_next().await.map_err(io::Error::other)? {
            if route.attributes.contains(&RouteAttribute::Oif(index)) {
                // Gone already is just as well.
                drop(inside.handle().route().del(route).execute().await);
            }
        }
    }
    Ok(())
}

/// Leads packets for the addresses of peers that are reached through the device, and no others.
async fn lead(
    handle: &Handle,
    device: &Device,
    led: &mut BTreeSet<IpAddr>,
    addresses: &BTreeMap<IpAddr, PeerIndex>,
) -> io::Result<()> {
    let reached = |index| device.heard.get(index).is_some_and(|heard| heard.reached);
    let wanted: BTreeSet<IpAddr> =
        addresses.iter().filter(|(_, index)| reached(index)).map(|(address, _)| *address).collect();
    for &address in led.difference(&wanted) {
        // Not there any more, if the device was made anew.
        drop(handle.route().del(route(device.index, address)).execute().await);
    }
    for &address in wanted.difference(led) {
        handle.route().add(route(device.index, address)).replace().execute().await.map_err(io::Error::other)?;
    }
    *led = wanted;
    Ok(())
}

fn route(device: u32, address: IpAddr) -> RouteMessage {
    match address {
        IpAddr::V4(address) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .output_interface(device)
            .scope(RouteScope::Link)
            .build(),
        IpAddr::V6(address) => {
            RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(address, 128).output_interface(device).build()
        }
    }
}

fn gone() -> io::Error {
    io::Error::other("the device of the kernel's WireGuard is gone")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Looks again and again, a second apart; each look finds (bytes received, bytes sent) more than before.
    #[track_caller]
    fn check(handshake_age: Duration, looks: &[(u64, u64)], want: bool) {
        let (began, today) = (Instant::now(), SystemTime::now());
        let keyed = today - 100 * SECOND;
        let mut status = PeerStatus {
            public_key: [1; 32],
            endpoint: None,
            last_handshake: Some(today - handshake_age),
            received_bytes: 0,
            sent_bytes: 0,
            addresses: Vec::new(),
        };
        let mut heard = Heard::after(None, &status, keyed, (began, today));
        for (&(received, sent), n) in looks.iter().zip(1..) {
            status.received_bytes += received;
            status.sent_bytes += sent;
            heard = Heard::after(Some(&heard), &status, keyed, (began + n * SECOND, today));
        }
        assert_eq!(heard.reached, want, "{heard:?}");
    }

    #[test]
    fn a_peer_is_reached_while_what_it_is_sent_is_answered() {
        check(SECOND, &[], true);
        check(101 * SECOND, &[], false);
        check(SECOND, &[(0, 1000); 12], true);
        check(SECOND, &[(0, 1000); 13], false);
        // Nothing is expected when nothing was said.
        check(SECOND, &[(0, EMPTY_LEN); 60], true);
        check(SECOND, &[[(0, 1000); 11], [(EMPTY_LEN, 1000); 11]].concat(), true);
        check(SECOND, &[&[(0, 1000); 20][..], &[(EMPTY_LEN, 148)]].concat(), true);
        // Asked once, and never answered.
        check(SECOND, &[&[(0, 1000)][..], &[(0, 0); 12]].concat(), false);
    }

    #[test]
    fn a_session_under_a_key_of_before_is_none() {
        let today = SystemTime::now();
        let status = PeerStatus {
            public_key: [1; 32],
            endpoint: None,
            last_handshake: Some(today - 2 * SECOND),
            received_bytes: 1,
            sent_bytes: 1,
            addresses: Vec::new(),
        };
        let at = (Instant::now(), today);
        assert!(Heard::after(None, &status, today - 3 * SECOND, at).reached);
        assert!(!Heard::after(None, &status, today - SECOND, at).reached);
        assert!(
            !Heard::after(None, &PeerStatus { last_handshake: None, ..status }, SystemTime::UNIX_EPOCH, at).reached
        );
    }

    #[test]
    fn what_a_device_was_told_is_found_again() {
        let peer = |n: u8| SealedPeer { key: [n; 32], endpoint: SocketAddr::new([192, 0, 2, n].into(), 4791) };
        let address = |n: u8| IpAddr::from([10, 0, 1, n]);
        let wanted = SealedState {
            key: Some(SecretBytes::new(vec![9; 32])),
            port: 4791,
            peers: [(1, peer(1)), (2, peer(2))].into(),
            addresses: [(address(1), 1), (address(2), 2)].into(),
        };
        let known = |n: u8, addresses: Vec<IpAddr>| PeerStatus {
            public_key: [n; 32],
            endpoint: None,
            last_handshake: None,
            received_bytes: 0,
            sent_bytes: 0,
            addresses,
        };
        let peers = vec![known(1, vec![address(1), address(7)]), known(3, vec![address(3)])];
        let told = told(&DeviceStatus { private_key: Some([9; 32]), peers }, &wanted);
        let addresses = [(address(1), 1), (address(7), 1)].into();
        assert_eq!(told, SealedState { peers: [(1, peer(1))].into(), addresses, ..wanted });
    }
}
