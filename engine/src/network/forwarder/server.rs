//! `skep forward SOCKET`: the process that listens.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use skep_api::service::Protocol;
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufStream};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};

use super::Forward;

/// The most connections, and the most clients by UDP, of all ports together.
const CLIENTS_MAX: usize = 16_384;
/// Connections that wait to be taken in.
const WAITING_MAX: i32 = 1024;
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long a client by UDP may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(90);
/// While there is no descriptor for a connection that waits.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const DATAGRAM_LEN_MAX: usize = 65_536;

/// Listens until there is nothing left to listen at.
pub fn forward_main(socket: &Path) -> i32 {
    // Out of the daemon's session; not possible, and not needed, if already leading one.
    let _ = nix::unistd::setsid();
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // With fewer, connections wait.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.and_then(|runtime| runtime.block_on(serve(socket))) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

async fn serve(socket: &Path) -> io::Result<()> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    // Whoever speaks there has the host's ports.
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    let mut served = Served { held: BTreeMap::new(), clients: Arc::new(Semaphore::new(CLIENTS_MAX)) };
    loop {
        let (stream, _) = listener.accept().await?;
        // A daemon that dies comes back and says all anew.
        if let Ok(Heard::NothingLeft) = served.converse(stream).await {
            return fs::remove_file(socket);
        }
    }
}

enum Heard {
    NothingLeft,
    TheEnd,
}

struct Served {
    held: BTreeMap<Forward, AbortHandle>,
    clients: Arc<Semaphore>,
}

impl Served {
    async fn converse(&mut self, stream: UnixStream) -> io::Result<Heard> {
        let mut stream = BufStream::new(stream);
        let mut line = String::new();
        while stream.read_line(&mut line).await? != 0 {
            let wanted: BTreeSet<Forward> = serde_json::from_str(&line)?;
            let mut answer = serde_json::to_vec(&self.put_in_force(&wanted).await)?;
            answer.push(b'\n');
            stream.write_all(&answer).await?;
            stream.flush().await?;
            if wanted.is_empty() {
                return Ok(Heard::NothingLeft);
            }
            line.clear();
        }
        Ok(Heard::TheEnd)
    }

    /// Returns what did not work.
    async fn put_in_force(&mut self, wanted: &BTreeSet<Forward>) -> Vec<String> {
        let gone: Vec<Forward> = self.held.keys().filter(|held| !wanted.contains(held)).cloned().collect();
        for forward in &gone {
            self.held.remove(forward).as_ref().inspect(|task| task.abort());
        }
        if !gone.is_empty() {
            // What was aborted closes its socket when it is looked at next.
            tokio::task::yield_now().await;
        }
        let mut failed = Vec::new();
        for forward in wanted {
            if self.held.contains_key(forward) {
                continue;
            }
            match self.listen(forward) {
                Ok(task) => drop(self.held.insert(forward.clone(), task)),
                Err(error) => failed.push(format!("{}/{}: {error}", forward.at, forward.protocol.as_str())),
            }
        }
        failed
    }

    fn listen(&self, forward: &Forward) -> io::Result<AbortHandle> {
        let (clients, to) = (self.clients.clone(), forward.to);
        let opened = open(forward.protocol, forward.at)?;
        let task = match forward.protocol {
            Protocol::Tcp => {
                let listener = tokio::net::TcpListener::from_std(TcpListener::from(opened))?;
                tokio::spawn(accept(listener, to, clients))
            }
            Protocol::Udp => {
                let socket = tokio::net::UdpSocket::from_std(UdpSocket::from(opened))?;
                tokio::spawn(relay(socket, to, clients))
            }
            Protocol::Sctp => return Err(io::Error::from(io::ErrorKind::Unsupported)),
        };
        Ok(task.abort_handle())
    }
}

/// Opens a socket at one address of one family; nothing is taken of the other.
pub(super) fn open(protocol: Protocol, at: SocketAddr) -> io::Result<Socket> {
    let stream = protocol == Protocol::Tcp;
    let opened = Socket::new(Domain::for_address(at), if stream { Type::STREAM } else { Type::DGRAM }, None)?;
    opened.set_nonblocking(true)?;
    if at.is_ipv6() {
        opened.set_only_v6(true)?;
    }
    if stream {
        // What is left of earlier connections is in nobody's way.
        opened.set_reuse_address(true)?;
    }
    opened.bind(&at.into())?;
    if stream {
        opened.listen(WAITING_MAX)?;
    }
    Ok(opened)
}

async fn accept(listener: tokio::net::TcpListener, to: SocketAddr, clients: Arc<Semaphore>) {
    loop {
        // Never closed.
        let Ok(permit) = clients.clone().acquire_owned().await else { return };
        let Ok((mut client, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // Connections live on without the port, as those that rules lead do.
        tokio::spawn(async move {
            if let Ok(Ok(mut container)) = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(to)).await {
                let _ = (client.set_nodelay(true), container.set_nodelay(true));
                // Either may end it, at any time.
                drop(tokio::io::copy_bidirectional(&mut client, &mut container).await);
            }
            drop(permit);
        });
    }
}

/// Passes datagrams on, with a socket for each client, and the answers back.
async fn relay(socket: tokio::net::UdpSocket, to: SocketAddr, clients: Arc<Semaphore>) {
    let socket = Arc::new(socket);
    let known: Arc<Mutex<HashMap<SocketAddr, Arc<tokio::net::UdpSocket>>>> = Arc::default();
    let mut answering = JoinSet::new();
    let mut buffer = vec![0; DATAGRAM_LEN_MAX];
    loop {
        while answering.try_join_next().is_some() {}
        let Ok((len, client)) = socket.recv_from(&mut buffer).await else { continue };
        let there = known.lock().expect("nobody panics while holding it").get(&client).cloned();
        let own = match there {
            Some(own) => own,
            None => {
                // Datagrams of more clients than there is room for are lost.
                let Ok(permit) = clients.clone().try_acquire_owned() else { continue };
                let Ok(own) = connected(to).await else { continue };
                let own = Arc::new(own);
                known.lock().expect("nobody panics while holding it").insert(client, own.clone());
                let (socket, known, answers) = (socket.clone(), known.clone(), own.clone());
                answering.spawn(async move {
                    answer(&socket, &answers, client).await;
                    known.lock().expect("nobody panics while holding it").remove(&client);
                    drop(permit);
                });
                own
            }
        };
        // As on any wire, a datagram may be lost.
        drop(own.send(&buffer[..len]).await);
    }
}

async fn connected(to: SocketAddr) -> io::Result<tokio::net::UdpSocket> {
    let any: SocketAddr = if to.is_ipv6() { ([0u16; 8], 0).into() } else { ([0u8; 4], 0).into() };
    let own = tokio::net::UdpSocket::bind(any).await?;
    own.connect(to).await?;
    Ok(own)
}

async fn answer(socket: &tokio::net::UdpSocket, own: &tokio::net::UdpSocket, client: SocketAddr) {
    let mut buffer = vec![0; DATAGRAM_LEN_MAX];
    // A container that does not listen yet refuses one, and may take the next.
    while let Ok(received) = tokio::time::timeout(SILENCE_MAX, own.recv(&mut buffer)).await {
        if let Ok(len) = received {
            drop(socket.send_to(&buffer[..len], client).await);
        }
    }
}
