//! Serves names to containers: in the namespace of each, at 127.0.0.11, over UDP and TCP.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use bincode::{Decode, Encode};
use hickory_proto::op::ResponseCode;
use skep_host_net::Netns;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::{Answer, Transport, Zone, answer, refuse};

/// Where containers find it.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
const PORT: u16 = 53;
/// How long another resolver has.
const UPSTREAM_LIMIT: Duration = Duration::from_secs(2);
/// Resolvers that are asked before it is given up.
const UPSTREAMS_MAX: usize = 3;
/// Questions of one container that are on their way to others; further ones wait.
const FORWARDS_MAX: usize = 64;
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
const MESSAGE_LEN_MAX: usize = 65_535;

/// A container that is served names; networks are known by `K`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Served<K> {
    pub netns: PathBuf,
    /// In the order in which names are looked for.
    pub networks: Vec<K>,
    /// Whether names of others may be asked for outside.
    pub forward: bool,
    /// Whom to ask; the host's own resolvers if empty.
    pub resolvers: Vec<IpAddr>,
}

/// The names of all networks, shared by all servers.
type Zones<K> = Arc<RwLock<BTreeMap<K, Arc<Zone>>>>;

/// The servers of all containers.
pub struct NameServers<K> {
    zones: Zones<K>,
    running: BTreeMap<String, Running<K>>,
}

impl<K> Default for NameServers<K> {
    fn default() -> Self {
        Self { zones: Arc::default(), running: BTreeMap::new() }
    }
}

impl<K> std::fmt::Debug for NameServers<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NameServers").field("running", &self.running.len()).finish_non_exhaustive()
    }
}

impl<K: Ord + Clone + Send + Sync + 'static> NameServers<K> {
    /// Changes one zone; one that is not there stays so.
    pub fn change(&self, id: &K, change: impl FnOnce(&mut Zone)) {
        let mut zones = self.zones.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(zone) = zones.get_mut(id) {
            change(Arc::make_mut(zone));
        }
    }

    /// Brings names and servers in line with what there should be; returns what could not be served.
    pub async fn update(
        &mut self,
        wanted_zones: &BTreeMap<K, Zone>,
        wanted: &BTreeMap<String, Served<K>>,
    ) -> Vec<(String, io::Error)> {
        {
            let mut zones = self.zones.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            zones.retain(|id, _| wanted_zones.contains_key(id));
            for (id, zone) in wanted_zones {
                if zones.get(id).is_none_or(|held| **held != *zone) {
                    zones.insert(id.clone(), Arc::new(zone.clone()));
                }
            }
        }
        let over = |(id, running): &(&String, &Running<K>)| {
            wanted.get(*id).is_none_or(|served| served.netns != running.server.served().netns)
        };
        let over: Vec<String> = self.running.iter().filter(over).map(|(id, _)| id.clone()).collect();
        for running in over.iter().filter_map(|id| self.running.remove(id)) {
            running.end().await;
        }
        let mut failed = Vec::new();
        for (id, served) in wanted {
            if let Some(running) = self.running.get(id) {
                running.server.serve(served);
                continue;
            }
            match Running::start(served.clone(), self.zones.clone()).await {
                Ok(running) => drop(self.running.insert(id.clone(), running)),
                Err(error) => failed.push((id.clone(), error)),
            }
        }
        failed
    }
}

/// A server with all that goes on in it.
struct Running<K> {
    server: Arc<Server<K>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// The server of one container.
struct Server<K> {
    served: RwLock<Arc<Served<K>>>,
    zones: Zones<K>,
    turn: AtomicUsize,
    forwards: Semaphore,
}

impl<K: Ord + Clone + Send + Sync + 'static> Running<K> {
    async fn start(served: Served<K>, zones: Zones<K>) -> io::Result<Self> {
        let netns = Netns::open(&served.netns)?;
        let (udp, tcp) = netns
            .run(|| {
                let udp = std::net::UdpSocket::bind((ADDRESS, PORT))?;
                let tcp = std::net::TcpListener::bind((ADDRESS, PORT))?;
                udp.set_nonblocking(true)?;
                tcp.set_nonblocking(true)?;
                Ok((udp, tcp))
            })
            .await?;
        let (udp, tcp) = (Arc::new(UdpSocket::from_std(udp)?), TcpListener::from_std(tcp)?);
        let server = Arc::new(Server {
            served: RwLock::new(Arc::new(served)),
            zones,
            turn: AtomicUsize::new(0),
            forwards: Semaphore::new(FORWARDS_MAX),
        });
        let running = Self { server, stop: CancellationToken::new(), tasks: TaskTracker::new() };
        let (server, tasks) = (running.server.clone(), running.tasks.clone());
        running.spawn(server.clone().serve_tcp(tcp));
        running.spawn(server.serve_udp(udp, tasks, running.stop.clone()));
        Ok(running)
    }

    fn spawn(&self, serving: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move { stop.run_until_cancelled(serving).await });
    }

    /// Ends it; another may take its place then.
    async fn end(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl<K: Ord + Clone + Send + Sync + 'static> Server<K> {
    fn served(&self) -> Arc<Served<K>> {
        self.served.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Serves something else from now on.
    fn serve(&self, wanted: &Served<K>) {
        let mut served = self.served.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if **served != *wanted {
            *served = Arc::new(wanted.clone());
        }
    }

    async fn serve_udp(self: Arc<Self>, socket: Arc<UdpSocket>, tasks: TaskTracker, stop: CancellationToken) {
        let mut buffer = vec![0; MESSAGE_LEN_MAX];
        loop {
            let Ok((len, from)) = socket.recv_from(&mut buffer).await else { continue };
            let question = buffer[..len].to_vec();
            match self.answer(&question, Transport::Udp) {
                // Who asks again is answered again: a lost reply is no loss.
                Answer::Reply(reply) => drop(socket.try_send_to(&reply, from)),
                Answer::Ignore => {}
                Answer::AskOthers => {
                    let (server, socket, stop) = (self.clone(), socket.clone(), stop.clone());
                    tasks.spawn(async move {
                        let asked = server.ask_others(&question, Transport::Udp);
                        if let Some(Some(reply)) = stop.run_until_cancelled(asked).await {
                            drop(socket.send_to(&reply, from).await);
                        }
                    });
                }
            }
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let server = self.clone();
            tokio::spawn(async move { drop(tokio::time::timeout(CONNECTION_LIMIT, server.converse(stream)).await) });
        }
    }

    async fn converse(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let Ok(len) = stream.read_u16().await else { return Ok(()) };
            let mut question = vec![0; usize::from(len)];
            stream.read_exact(&mut question).await?;
            let reply = match self.answer(&question, Transport::Tcp) {
                Answer::Reply(reply) => Some(reply),
                Answer::Ignore => None,
                Answer::AskOthers => self.ask_others(&question, Transport::Tcp).await,
            };
            let Some(reply) = reply else { return Ok(()) };
            write_message(&mut stream, &reply).await?;
        }
    }

    fn answer(&self, question: &[u8], transport: Transport) -> Answer {
        let zones: Vec<Arc<Zone>> = {
            let zones = self.zones.read().unwrap_or_else(std::sync::PoisonError::into_inner);
            self.served().networks.iter().filter_map(|network| zones.get(network).cloned()).collect()
        };
        let zones: Vec<&Zone> = zones.iter().map(AsRef::as_ref).collect();
        answer(question, &zones, transport, self.turn.fetch_add(1, Ordering::Relaxed))
    }

    /// Asks the resolvers of the host, or those the container was given.
    async fn ask_others(&self, question: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let refusal = |code| match refuse(question, code, transport) {
            Answer::Reply(reply) => Some(reply),
            Answer::AskOthers | Answer::Ignore => None,
        };
        let served = self.served();
        if !served.forward {
            // Nothing of an internal network gets out, not even a question.
            return refusal(ResponseCode::NXDomain);
        }
        let _permit = self.forwards.acquire().await.ok()?;
        let resolvers = if served.resolvers.is_empty() { host_resolvers() } else { served.resolvers.clone() };
        for resolver in resolvers.into_iter().take(UPSTREAMS_MAX) {
            let to = SocketAddr::new(resolver, PORT);
            let asked = async {
                match transport {
                    Transport::Udp => ask_udp(to, question).await,
                    Transport::Tcp => ask_tcp(to, question).await,
                }
            };
            if let Ok(Ok(reply)) = tokio::time::timeout(UPSTREAM_LIMIT, asked).await {
                return Some(reply);
            }
        }
        refusal(ResponseCode::ServFail)
    }
}

async fn ask_udp(to: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(to).await?;
    socket.send(question).await?;
    let mut reply = vec![0; MESSAGE_LEN_MAX];
    loop {
        let len = socket.recv(&mut reply).await?;
        // A reply to another question is none to this one.
        if len >= 2 && reply[..2] == question[..2] {
            reply.truncate(len);
            return Ok(reply);
        }
    }
}

async fn ask_tcp(to: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(to).await?;
    write_message(&mut stream, question).await?;
    let len = stream.read_u16().await?;
    let mut reply = vec![0; usize::from(len)];
    stream.read_exact(&mut reply).await?;
    Ok(reply)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(io::Error::other)?;
    let whole = [&len.to_be_bytes()[..], message].concat();
    stream.write_all(&whole).await
}

/// The host's own resolvers, as they are now.
fn host_resolvers() -> Vec<IpAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = text.lines().filter_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok());
    servers.filter(|&server| server != IpAddr::from(ADDRESS)).collect()
}
