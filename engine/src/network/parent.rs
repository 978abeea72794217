//! Networks on a link of the host's: their containers stand in that link's own network, with addresses and MAC addresses of
//! their own there (macvlan).

use std::fmt;
use std::io;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use rtnetlink::packet_route::link::{LinkMessage, MacVlanMode};
use rtnetlink::{Handle, LinkBridge, LinkMacVlan, LinkUnspec};
use serde::{Deserialize, Serialize};
use skep_host_net::{Netlink, Netns, link_index};

use super::MacAddress;
use super::links::eth;

/// How long the links of a container that is gone may be there still.
const GONE_LIMIT: Duration = Duration::from_secs(5);
const GONE_PAUSE: Duration = Duration::from_millis(10);

/// The link that a network's containers share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    pub link: String,
    pub mode: Mode,
    /// Whether it was made for the network, and leads nowhere else.
    pub own: bool,
}

/// Who reaches whom among those that share a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// All of them.
    #[default]
    Bridge,
    /// None of them.
    Private,
    /// As the switch behind the link decides.
    Vepa,
    /// There is one only.
    Passthru,
}

/// A mode that there is not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("macvlan_mode {0:?} is unknown: use bridge, private, vepa or passthru")]
pub struct ModeError(String);

impl std::str::FromStr for Mode {
    type Err = ModeError;

    fn from_str(text: &str) -> Result<Self, ModeError> {
        let all = [Self::Bridge, Self::Private, Self::Vepa, Self::Passthru];
        all.into_iter().find(|mode| mode.to_string() == text).ok_or_else(|| ModeError(text.to_owned()))
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Bridge => "bridge",
            Self::Private => "private",
            Self::Vepa => "vepa",
            Self::Passthru => "passthru",
        })
    }
}

impl Parent {
    /// The link itself; one of the network's own is made if it is not there.
    pub(super) async fn ensure(&self, handle: &Handle) -> io::Result<u32> {
        if self.own && link_index(handle, &self.link).await.is_none() {
            handle.link().add(LinkBridge::new(&self.link).up().build()).execute().await.map_err(io::Error::other)?;
        }
        let index = link_index(handle, &self.link).await;
        index.ok_or_else(|| io::Error::other(format!("the parent link {} is gone: bring it back", self.link)))
    }

    /// Makes a container's link where it belongs.
    pub(super) async fn make_link(&self, index: u32, namespace: &Netns, link: u32, mac: MacAddress) -> io::Result<()> {
        let netlink = Netlink::open()?;
        let deadline = Instant::now() + GONE_LIMIT;
        // Older kernels (6.1 is one) refuse a name that the host has, too, though the link is to be elsewhere.
        let name: String = mac.bytes().iter().fold("mv".to_owned(), |name, byte| format!("{name}{byte:02x}"));
        loop {
            match netlink.handle().link().add(self.link_in(index, namespace, &name, mac)).execute().await {
                // By the address's last user: the kernel takes a namespace and its links down in its own time.
                Err(rtnetlink::Error::NetlinkError(said))
                    if said.raw_code() == -libc::EADDRINUSE && Instant::now() < deadline =>
                {
                    tokio::time::sleep(GONE_PAUSE).await;
                }
                other => break other.map_err(io::Error::other)?,
            }
        }
        let within = Netlink::open_in(namespace).await?;
        let made = link_index(within.handle(), &name).await.ok_or_else(|| io::Error::other("the link is gone"))?;
        let named = LinkUnspec::new_with_index(made).name(eth(link)).build();
        within.handle().link().set(named).execute().await.map_err(io::Error::other)
    }

    fn link_in(&self, index: u32, namespace: &Netns, name: &str, mac: MacAddress) -> LinkMessage {
        let mode = match self.mode {
            Mode::Bridge => MacVlanMode::Bridge,
            Mode::Private => MacVlanMode::Private,
            Mode::Vepa => MacVlanMode::Vepa,
            Mode::Passthru => MacVlanMode::Passthrough,
        };
        let made = LinkMacVlan::new(name, index, mode).setns_by_fd(namespace.as_raw_fd());
        // The one container of such a network is the link itself.
        if self.mode == Mode::Passthru { made.build() } else { made.address(mac.bytes().to_vec()).build() }
    }
}

/// Whether the host has a link of this name; what `/sys` shows may be another namespace's.
pub(crate) fn is_link(name: &str) -> bool {
    nix::net::if_::if_nametoindex(name).is_ok()
}
