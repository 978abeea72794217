//! Listens at the host's published ports, for whom no rule leads to a container: clients of the host's ::1, and those of
//! its IPv6 addresses where the container has IPv4 alone. Nobody else of the host gets such a port meanwhile.
//!
//! One process of the host's does it, which goes on without the daemon.

mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skep_api::service::Protocol;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufStream};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::{GATEWAY_MODE, GATEWAY_MODE_V6, LocalNetwork};
use crate::container::config::PublishedPort;
use crate::engine::HelperProgram;
use crate::network::lease::Lease;

pub use server::forward_main;

const SOCKET: &str = "ports.sock";
const START_LIMIT: Duration = Duration::from_secs(5);
const START_PAUSE: Duration = Duration::from_millis(2);
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long to wait before the process is started once more.
const AGAIN_PAUSE: Duration = Duration::from_secs(1);

/// A port of the host's, and where what comes to it goes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Forward {
    pub(super) protocol: Protocol,
    pub(super) at: SocketAddr,
    pub(super) to: SocketAddr,
}

/// Says what is to be listened at; the daemon's side.
#[derive(Debug)]
pub(super) struct Forwarder {
    requests: mpsc::Sender<(BTreeSet<Forward>, oneshot::Sender<()>)>,
}

impl Forwarder {
    pub(super) fn new(helper: Arc<HelperProgram>, run_dir: PathBuf) -> Self {
        let (requests, wanted) = mpsc::channel(16);
        tokio::spawn(Keeper { helper, run_dir, stream: None, told: BTreeSet::new() }.run(wanted));
        Self { requests }
    }

    /// Returns once it is so, or cannot be: then the log says why.
    pub(super) async fn set(&self, wanted: BTreeSet<Forward>) {
        let (done, is_done) = oneshot::channel();
        if self.requests.send((wanted, done)).await.is_ok() {
            // Not answered if the daemon ends.
            drop(is_done.await);
        }
    }
}

/// Holds the connection to the process.
struct Keeper {
    helper: Arc<HelperProgram>,
    run_dir: PathBuf,
    stream: Option<BufStream<UnixStream>>,
    told: BTreeSet<Forward>,
}

impl Keeper {
    async fn run(mut self, mut wanted: mpsc::Receiver<(BTreeSet<Forward>, oneshot::Sender<()>)>) {
        loop {
            let ended = async {
                match self.stream.as_mut() {
                    // Nothing is said there without being asked.
                    Some(stream) => drop(stream.fill_buf().await),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                request = wanted.recv() => {
                    let Some((forwards, done)) = request else { return };
                    self.tell(forwards).await;
                    // Whoever asked may have gone.
                    let _ = done.send(());
                }
                () = ended => {
                    self.stream = None;
                    if !self.told.is_empty() {
                        tracing::warn!("the process at published ports has ended; it is started again");
                        tokio::time::sleep(AGAIN_PAUSE).await;
                        let told = std::mem::take(&mut self.told);
                        self.tell(told).await;
                    }
                }
            }
        }
    }

    async fn tell(&mut self, forwards: BTreeSet<Forward>) {
        if self.stream.is_some() && self.told == forwards {
            return;
        }
        let mut told = self.try_tell(&forwards).await;
        if told.is_err() && self.stream.take().is_some() {
            // It may just have ended.
            told = self.try_tell(&forwards).await;
        }
        match told {
            Ok(failed) => {
                failed.iter().for_each(|reason| tracing::warn!(reason, "a published port is not listened at"))
            }
            Err(error) => {
                self.stream = None;
                tracing::warn!(%error, "published ports are not listened at");
            }
        }
        if forwards.is_empty() {
            // It has nothing left to do, and ends.
            self.stream = None;
        }
        self.told = forwards;
    }

    async fn try_tell(&mut self, forwards: &BTreeSet<Forward>) -> io::Result<Vec<String>> {
        if self.stream.is_none() {
            self.stream = match UnixStream::connect(self.run_dir.join(SOCKET)).await {
                Ok(stream) => Some(BufStream::new(stream)),
                Err(_) if forwards.is_empty() => return Ok(Vec::new()),
                Err(_) => Some(BufStream::new(self.start().await?)),
            };
        }
        let Some(stream) = self.stream.as_mut() else { return Ok(Vec::new()) };
        let exchange = async {
            let mut line = serde_json::to_vec(forwards)?;
            line.push(b'\n');
            stream.write_all(&line).await?;
            stream.flush().await?;
            let mut answer = String::new();
            if stream.read_line(&mut answer).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            Ok(serde_json::from_str(&answer)?)
        };
        tokio::time::timeout(ANSWER_LIMIT, exchange).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    async fn start(&self) -> io::Result<UnixStream> {
        let socket = self.run_dir.join(SOCKET);
        let mut command = self.helper.command();
        command.arg("forward").arg(&socket).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        let deadline = tokio::time::Instant::now() + START_LIMIT;
        loop {
            if let Ok(stream) = UnixStream::connect(&socket).await {
                // It lives on without the daemon; it is only waited for so that it leaves no zombie.
                tokio::spawn(async move { drop(child.wait().await) });
                return Ok(stream);
            }
            if let Some(status) = child.try_wait()? {
                return Err(io::Error::other(format!("the process at published ports ended ({status})")));
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(io::Error::from(io::ErrorKind::TimedOut));
            }
            tokio::time::sleep(START_PAUSE).await;
        }
    }
}

/// Where containers' ports are listened at, and where what comes there goes.
pub(super) fn forwards(
    networks: &BTreeMap<String, LocalNetwork>,
    leases: &BTreeMap<String, Lease>,
    has_ipv6: bool,
) -> BTreeSet<Forward> {
    let mut forwards = BTreeSet::new();
    for lease in leases.values() {
        let outward = |network: &String| networks.get(network).filter(|network| !network.internal);
        let nat = |network: &String, key: &str| outward(network).is_some_and(|network| network.is_translated(key));
        let places = || lease.places.iter();
        let v4 = places().find_map(|place| place.address.filter(|_| nat(&place.network, GATEWAY_MODE)));
        let v6 = places().find_map(|place| place.address_v6.filter(|_| nat(&place.network, GATEWAY_MODE_V6)));
        let has_v6 = places().any(|place| place.address_v6.is_some());
        for port in &lease.ports {
            for at in listened_at(port, has_ipv6) {
                let to = match lease.through {
                    Some(through) => SocketAddr::new(through.into(), port.host_port),
                    // Who has IPv6 is reached by it as its network says; nobody without IPv4 is reached by that.
                    None => match if at.is_ipv6() && has_v6 { v6.map(IpAddr::from) } else { v4.map(IpAddr::from) } {
                        Some(address) => SocketAddr::new(address, port.container_port),
                        None => continue,
                    },
                };
                if port.protocol != Protocol::Sctp && port.host_port != 0 {
                    forwards.insert(Forward { protocol: port.protocol, at: SocketAddr::new(at, port.host_port), to });
                }
            }
        }
    }
    forwards
}

/// The host's addresses that a port is published on.
fn listened_at(port: &PublishedPort, has_ipv6: bool) -> Vec<IpAddr> {
    match port.host_ip {
        Some(address) => vec![address],
        None if has_ipv6 => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        None => vec![Ipv4Addr::UNSPECIFIED.into()],
    }
}

/// Why a port of this host's cannot be had, if it cannot.
pub(super) fn why_not_free(port: &PublishedPort, has_ipv6: bool) -> Option<String> {
    listened_at(port, has_ipv6).into_iter().find_map(|address| {
        let at = SocketAddr::new(address, port.host_port);
        let error = server::open(port.protocol, at).err()?;
        let says = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "address already in use: another program of this host has it, choose another port".to_owned()
            }
            io::ErrorKind::AddrNotAvailable => "cannot assign requested address: this host does not have it".to_owned(),
            _ => error.to_string(),
        };
        Some(format!("failed to bind host port {at}/{}: {says}", port.protocol.as_str()))
    })
}
