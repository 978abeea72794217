//! The kernel's own WireGuard: what its devices are told, and what they tell of their peers.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use genetlink::{GenetlinkHandle, new_connection};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_generic::GenlMessage;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use tokio::task::JoinHandle;

use crate::Netns;

/// A public or a private key of X25519.
pub type Key = [u8; 32];

/// How many addresses are told of in one message: some 30 bytes each, of the 64 KiB that an attribute can be long.
const ADDRESSES_MAX: usize = 1000;

/// What a device knows.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct DeviceStatus {
    pub private_key: Option<Key>,
    pub peers: Vec<PeerStatus>,
}

/// The private key is not for logs.
impl fmt::Debug for DeviceStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceStatus").field("peers", &self.peers).finish_non_exhaustive()
    }
}

/// What a device knows of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    pub public_key: Key,
    /// Where packets were last seen from.
    pub endpoint: Option<SocketAddr>,
    /// None: never.
    pub last_handshake: Option<SystemTime>,
    pub received_bytes: u64,
    pub sent_bytes: u64,
    /// What it may send from, and is sent.
    pub addresses: Vec<IpAddr>,
}

/// A conversation with the kernel's WireGuard, about the namespace that it was opened in.
#[derive(Debug)]
pub struct WireGuard {
    handle: GenetlinkHandle,
    driver: JoinHandle<()>,
}

impl WireGuard {
    /// Opens a conversation in the calling thread's namespace; `None` if the kernel has no WireGuard. A module is
    /// loaded by the kernel itself.
    pub async fn open() -> io::Result<Option<Self>> {
        let (connection, handle, _) = new_connection()?;
        let opened = Self { handle, driver: tokio::spawn(connection) };
        let family = opened.handle.resolve_family::<WireguardMessage>().await;
        Ok(family.is_ok().then_some(opened))
    }

    /// The same in `netns`.
    pub async fn open_in(netns: &Netns) -> io::Result<Option<Self>> {
        let runtime = tokio::runtime::Handle::current();
        netns.run(move || runtime.block_on(Self::open())).await
    }

    /// Gives a device its key and its UDP port.
    pub async fn set_up(&mut self, device: &str, private_key: Key, port: u16) -> io::Result<()> {
        self.set(device, vec![WireguardAttribute::PrivateKey(private_key), WireguardAttribute::ListenPort(port)]).await
    }

    /// Makes a peer known, or known by another endpoint; `addresses` are its own from now on, and no other peer's.
    pub async fn add_peer(
        &mut self,
        device: &str,
        (public_key, endpoint): (Key, Option<SocketAddr>),
        keepalive: Duration,
        addresses: &[IpAddr],
    ) -> io::Result<()> {
        let keepalive_secs = u16::try_from(keepalive.as_secs()).unwrap_or(u16::MAX);
        let known = endpoint.map(WireguardPeerAttribute::Endpoint).into_iter();
        let known: Vec<_> = known.chain([WireguardPeerAttribute::PersistentKeepalive(keepalive_secs)]).collect();
        let first = addresses.chunks(ADDRESSES_MAX).next().unwrap_or_default();
        self.tell_of(device, public_key, [known, vec![allowed(first)]].concat()).await?;
        for more in addresses.chunks(ADDRESSES_MAX).skip(1) {
            self.tell_of(device, public_key, vec![allowed(more)]).await?;
        }
        Ok(())
    }

    /// Forgets a peer with its sessions and addresses; one that is not known is no error.
    pub async fn remove_peer(&mut self, device: &str, public_key: Key) -> io::Result<()> {
        self.tell_of(device, public_key, vec![WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe)]).await
    }

    async fn tell_of(&mut self, device: &str, peer: Key, what: Vec<WireguardPeerAttribute>) -> io::Result<()> {
        let peer = WireguardPeer([vec![WireguardPeerAttribute::PublicKey(peer)], what].concat());
        self.set(device, vec![WireguardAttribute::Peers(vec![peer])]).await
    }

    async fn set(&mut self, device: &str, what: Vec<WireguardAttribute>) -> io::Result<()> {
        let attributes = [vec![WireguardAttribute::IfName(device.to_owned())], what].concat();
        self.ask(WireguardCmd::SetDevice, attributes, NLM_F_ACK, |_| ()).await
    }

    /// What a device knows at this moment.
    pub async fn status(&mut self, device: &str) -> io::Result<DeviceStatus> {
        let mut status = DeviceStatus::default();
        let name = vec![WireguardAttribute::IfName(device.to_owned())];
        self.ask(WireguardCmd::GetDevice, name, NLM_F_DUMP, |part| note(&mut status, part)).await?;
        Ok(status)
    }

    async fn ask(
        &mut self,
        cmd: WireguardCmd,
        attributes: Vec<WireguardAttribute>,
        flags: u16,
        mut take: impl FnMut(WireguardMessage),
    ) -> io::Result<()> {
        let mut message = NetlinkMessage::from(GenlMessage::from_payload(WireguardMessage { cmd, attributes }));
        message.header.flags = NLM_F_REQUEST | flags;
        let mut answers = self.handle.request(message).await.map_err(io::Error::other)?;
        while let Some(answer) = answers.next().await {
            match answer.map_err(io::Error::other)?.payload {
                NetlinkPayload::InnerMessage(part) => take(part.payload),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for WireGuard {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Single addresses, as a peer's.
fn allowed(addresses: &[IpAddr]) -> WireguardPeerAttribute {
    let one = |address: &IpAddr| {
        let (family, bits) = match address {
            IpAddr::V4(_) => (WireguardAddressFamily::Ipv4, 32),
            IpAddr::V6(_) => (WireguardAddressFamily::Ipv6, 128),
        };
        WireguardAllowedIp(vec![
            WireguardAllowedIpAttr::Family(family),
            WireguardAllowedIpAttr::IpAddr(*address),
            WireguardAllowedIpAttr::Cidr(bits),
        ])
    };
    WireguardPeerAttribute::AllowedIps(addresses.iter().map(one).collect())
}

/// Takes in a part of what a device tells: of a peer with many addresses, there are several.
fn note(status: &mut DeviceStatus, part: WireguardMessage) {
    for attribute in part.attributes {
        match attribute {
            WireguardAttribute::PrivateKey(key) => status.private_key = Some(key),
            WireguardAttribute::Peers(peers) => {
                for peer in peers.iter().filter_map(peer_status) {
                    match status.peers.last_mut().filter(|last| last.public_key == peer.public_key) {
                        Some(last) => last.addresses.extend(peer.addresses),
                        None => status.peers.push(peer),
                    }
                }
            }
            _ => {}
        }
    }
}

fn peer_status(told: &WireguardPeer) -> Option<PeerStatus> {
    let mut peer = PeerStatus {
        public_key: [0; 32],
        endpoint: None,
        last_handshake: None,
        received_bytes: 0,
        sent_bytes: 0,
        addresses: Vec::new(),
    };
    let mut named = false;
    for attribute in &told.0 {
        match attribute {
            WireguardPeerAttribute::PublicKey(key) => (peer.public_key, named) = (*key, true),
            WireguardPeerAttribute::Endpoint(endpoint) => peer.endpoint = Some(*endpoint),
            WireguardPeerAttribute::LastHandshake(at) => {
                let (seconds, nanos) = (u64::try_from(at.seconds), u32::try_from(at.nano_seconds));
                let since = seconds.ok().filter(|seconds| *seconds > 0).zip(nanos.ok());
                peer.last_handshake = since.map(|(secs, nanos)| SystemTime::UNIX_EPOCH + Duration::new(secs, nanos));
            }
            WireguardPeerAttribute::RxBytes(bytes) => peer.received_bytes = *bytes,
            WireguardPeerAttribute::TxBytes(bytes) => peer.sent_bytes = *bytes,
            WireguardPeerAttribute::AllowedIps(allowed) => {
                peer.addresses.extend(allowed.iter().flat_map(|one| &one.0).filter_map(|attribute| match attribute {
                    WireguardAllowedIpAttr::IpAddr(address) => Some(*address),
                    _ => None,
                }));
            }
            _ => {}
        }
    }
    named.then_some(peer)
}
