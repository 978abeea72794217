//! gRPC between nodes over mutual TLS 1.3: the listener that knows its peers, and connections to
//! managers.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use hyper_util::rt::TokioIo;
use skep_api::session;
use skep_pki::{PeerIdentity, TlsError, TlsIdentity};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Uri};

const GRPC: &[u8] = b"h2";
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// How often another attempt is begun until then.
const ATTEMPT_EVERY: Duration = Duration::from_millis(250);
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// A dead connection is noticed within the sum of both: soon enough for a worker to find a new
/// leader before that gives it up.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(1);
const KEEPALIVE_LIMIT: Duration = Duration::from_millis(1500);
const ACCEPTED_WAITING_MAX: usize = 256;

/// Who is at the other end of an accepted connection.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// Absent for a node that has no certificate yet.
    pub identity: Option<PeerIdentity>,
    pub addr: SocketAddr,
}

/// What comes in by the control port: calls, and workers' sessions.
pub(crate) struct Accepted {
    pub(crate) grpc: mpsc::Receiver<io::Result<PeerStream>>,
    pub(crate) sessions: mpsc::Receiver<PeerStream>,
}

/// An accepted connection.
pub struct PeerStream {
    inner: server::TlsStream<TcpStream>,
    info: PeerInfo,
}

impl std::fmt::Debug for PeerStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PeerStream").field(&self.info).finish()
    }
}

impl PeerStream {
    pub(crate) const fn info(&self) -> &PeerInfo {
        &self.info
    }

    fn is_session(&self) -> bool {
        self.inner.get_ref().1.alpn_protocol() == Some(session::ALPN)
    }
}

impl Connected for PeerStream {
    type ConnectInfo = PeerInfo;
    fn connect_info(&self) -> PeerInfo {
        self.info.clone()
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Accepts connections until `stop`; handshakes run beside each other, each with a limit.
pub(crate) fn accept(
    listener: TcpListener,
    tls: &Arc<TlsIdentity>,
    stop: CancellationToken,
) -> Result<Accepted, TlsError> {
    let config: Arc<ServerConfig> = Arc::new(tls.server_config(&[GRPC, session::ALPN])?);
    let (to_grpc, grpc) = mpsc::channel(ACCEPTED_WAITING_MAX);
    let (to_sessions, sessions) = mpsc::channel(ACCEPTED_WAITING_MAX);
    tokio::spawn(async move {
        loop {
            let connection = tokio::select! {
                () = stop.cancelled() => return,
                connection = listener.accept() => connection,
            };
            let Ok((stream, addr)) = connection else { continue };
            let acceptor = TlsAcceptor::from(config.clone());
            let (to_grpc, to_sessions) = (to_grpc.clone(), to_sessions.clone());
            tokio::spawn(async move {
                match tokio::time::timeout(HANDSHAKE_LIMIT, handshake(acceptor, stream, addr)).await {
                    // Whoever takes them may be on its way down.
                    Ok(Ok(stream)) if stream.is_session() => drop(to_sessions.send(stream).await),
                    Ok(Ok(stream)) => drop(to_grpc.send(Ok(stream)).await),
                    Ok(Err(error)) => tracing::debug!(%addr, %error, "a handshake failed"),
                    Err(_) => tracing::debug!(%addr, "a handshake took too long"),
                }
            });
        }
    });
    Ok(Accepted { grpc, sessions })
}

async fn handshake(acceptor: TlsAcceptor, stream: TcpStream, addr: SocketAddr) -> io::Result<PeerStream> {
    stream.set_nodelay(true)?;
    let inner = acceptor.accept(stream).await?;
    let certificate = inner.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let identity = certificate.map(PeerIdentity::from_certificate).transpose().map_err(io::Error::other)?;
    Ok(PeerStream { inner, info: PeerInfo { identity, addr } })
}

/// Connections to managers, one each, made when first used and made again when lost.
#[derive(Clone, Debug)]
pub struct Channels {
    tls: Arc<TlsIdentity>,
    open: Arc<Mutex<BTreeMap<String, Channel>>>,
}

impl Channels {
    #[must_use]
    pub fn new(tls: Arc<TlsIdentity>) -> Self {
        Self { tls, open: Arc::default() }
    }

    /// A channel to the manager at `addr` (`host:port`); its certificate must be a manager's.
    pub fn to(&self, addr: &str) -> Result<Channel, TlsError> {
        let mut open = self.open.lock().expect("nobody panics while holding it");
        if let Some(channel) = open.get(addr) {
            return Ok(channel.clone());
        }
        let channel = channel(addr, Arc::new(self.tls.client_config(&[GRPC])?));
        open.insert(addr.to_owned(), channel.clone());
        Ok(channel)
    }

    /// A connection of its own to the manager at `addr`, for a session.
    pub async fn session(&self, addr: &str) -> io::Result<client::TlsStream<TcpStream>> {
        let config = self.tls.client_config(&[session::ALPN]).map_err(io::Error::other)?;
        session_connection(Arc::new(config), addr).await
    }

    /// Forgets a channel, so that the next use connects anew (with a renewed certificate, say).
    pub fn forget(&self, addr: &str) {
        self.open.lock().expect("nobody panics while holding it").remove(addr);
    }

    pub fn forget_all(&self) {
        self.open.lock().expect("nobody panics while holding it").clear();
    }
}

/// Connects, in several attempts that overlap: a first packet that is lost is sent again after a second,
/// which is too late for those who look for a new leader.
async fn dial(addr: &str) -> io::Result<TcpStream> {
    let mut attempts = FuturesUnordered::new();
    loop {
        attempts.push(TcpStream::connect(addr));
        tokio::select! {
            Some(connected) = attempts.next() => match connected {
                Ok(stream) => return Ok(stream),
                Err(error) if attempts.is_empty() => return Err(error),
                Err(_) => {}
            },
            () = tokio::time::sleep(ATTEMPT_EVERY) => {}
        }
    }
}

/// A connection over `config` for a session with the manager at `addr`.
pub async fn session_connection(config: Arc<ClientConfig>, addr: &str) -> io::Result<client::TlsStream<TcpStream>> {
    tokio::time::timeout(CONNECT_LIMIT, connect(addr, config)).await?
}

/// Connects to a manager; its certificate must be a manager's.
async fn connect(addr: &str, config: Arc<ClientConfig>) -> io::Result<client::TlsStream<TcpStream>> {
    let stream = dial(addr).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from("swarm-manager").expect("a valid name");
    TlsConnector::from(config).connect(name, stream).await
}

/// A lazy channel over `config`.
pub fn channel(addr: &str, config: Arc<ClientConfig>) -> Channel {
    let addr = addr.to_owned();
    let target = addr.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let (config, addr) = (config.clone(), target.clone());
        async move { Ok::<_, io::Error>(TokioIo::new(connect(&addr, config).await?)) }
    });
    Endpoint::from_shared(format!("http://{addr}"))
        .unwrap_or_else(|_| Endpoint::from_static("http://invalid"))
        .connect_timeout(CONNECT_LIMIT)
        .http2_keep_alive_interval(KEEPALIVE_EVERY)
        .keep_alive_timeout(KEEPALIVE_LIMIT)
        .keep_alive_while_idle(true)
        .connect_with_connector_lazy(connector)
}
