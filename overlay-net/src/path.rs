//! The data path's process: it owns the device and the tunnels, and serves names. It outlives the
//! daemon, so that packets go on while that is away; the daemon tells it what to do over a socket.

pub(crate) mod client;
mod frame;
mod merge;
pub(crate) mod message;
pub(crate) mod peers;
pub(crate) mod pump;

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use skep_host_net::{Netns, has_ipv6};
use socket2::{Domain, Socket, Type};
use tokio::net::{UnixListener, UnixStream};

use crate::kernel::sealed;
use crate::sys;
pub(crate) use message::PeerReport;
use message::{FromPath, PathState, ToPath, ZoneKey, receive, send};
use pump::Pump;
use skep_name_server::NameServers;

/// The device inside the overlay's namespace.
pub(crate) const DEVICE: &str = "wire0";

/// How the process is set up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PathConfig {
    /// The overlay's namespace; the tunnels' own packets pass through the host's.
    pub(crate) netns: PathBuf,
    /// Where the daemon speaks to it.
    pub(crate) socket: PathBuf,
    pub(crate) port: u16,
}

/// `skep datapath FILE`: runs until it is told to end.
pub fn path_main(config: &Path) -> i32 {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("the data path does not start: {error}");
            return 1;
        }
    };
    match runtime.block_on(run(config)) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("the data path does not run: {error}");
            1
        }
    }
}

async fn run(config: &Path) -> io::Result<()> {
    let config: PathConfig = serde_json::from_slice(&fs::read(config)?)?;
    // Out of the daemon's session; not possible, and not needed, if already leading one.
    let _ = nix::unistd::setsid();
    let socket = listen(config.port).map_err(|error| {
        io::Error::new(error.kind(), format!("port {}/udp of the data path cannot be used: {error}", config.port))
    })?;
    let netns = Netns::open(&config.netns)?;
    let tap = netns.run(|| sys::open_tap(DEVICE)).await?;
    let pump = Pump::new(tap, socket)?;
    pump.start()?;
    match fs::remove_file(&config.socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&config.socket)?;
    let mut served = Served { pump, state: PathState::default(), names: NameServers::default() };
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    loop {
        let stream = tokio::select! {
            _ = terminate.recv() => return Ok(()),
            accepted = listener.accept() => accepted?.0,
        };
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            // A daemon that dies in the middle of a word comes back and begins anew.
            ended = served.converse(stream) => drop(ended),
        }
        // Nobody looks after those any more: what passes here needs nobody.
        if let Err(error) = sealed::let_go(&netns).await {
            eprintln!("packets still pass through the kernel's WireGuard, without a daemon: {error}");
        }
    }
}

/// Where tunnels of both families come in, if the host has both.
fn listen(port: u16) -> io::Result<UdpSocket> {
    if !has_ipv6() {
        return UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port));
    }
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, None)?;
    socket.set_only_v6(false)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    Ok(socket.into())
}

/// What the daemon's words change.
struct Served {
    pump: Arc<Pump>,
    state: PathState,
    names: NameServers<ZoneKey>,
}

impl Served {
    async fn converse(&mut self, mut stream: UnixStream) -> io::Result<()> {
        send(&mut stream, &FromPath::Ready).await?;
        while let Some(message) = receive(&mut stream).await? {
            match message {
                ToPath::Replace(state) => {
                    self.state = *state;
                    self.put_in_force().await;
                }
                ToPath::Change(change) => match change.names_alone() {
                    Some(names) => {
                        names.iter().for_each(|(key, names)| self.names.change(key, |zone| names.write(zone)));
                        self.state.apply(*change);
                    }
                    None => {
                        self.state.apply(*change);
                        self.put_in_force().await;
                    }
                },
                ToPath::Sync(token) => send(&mut stream, &FromPath::Synced(token)).await?,
                ToPath::Report => send(&mut stream, &FromPath::Report(self.pump.peers().reports())).await?,
            }
        }
        Ok(())
    }

    async fn put_in_force(&mut self) {
        self.pump.replace_peers(&self.state);
        for (id, error) in self.names.update(&self.state.zones, &self.state.served).await {
            // Its container may just have ended.
            eprintln!("names cannot be served to container {id}: {error}");
        }
    }
}
