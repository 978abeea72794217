//! Bulk traffic between nodes over QUIC (7946/udp), with the node's own certificate both ways:
//! raft snapshots from manager to manager, and the output of tasks from workers to managers.
//!
//! A request is one bidirectional stream: a length-prefixed request, then length-prefixed frames
//! in whichever direction the request has.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connection, Endpoint, RecvStream, SendStream, ServerConfig, TransportConfig};
use skep_api::{Extensible, NodeRole, TaskId, Timestamp, encoding};
use skep_engine::{Engine, LogLine, LogOptions, LogSource};
use skep_manager::{BulkReply, BulkTransport, Envelope};
use skep_pki::{PeerIdentity, TlsIdentity};
use skep_raft_store::Store;
use skep_worker::TASK_ID_LABEL;
use tokio::sync::mpsc;

const ALPN: &[&[u8]] = &[b"skep-bulk/1"];
const FRAME_LEN_MAX: usize = 16 << 20;
const IDLE_LIMIT: Duration = Duration::from_secs(10);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(3);
/// Streams one peer may have open at a time.
const STREAMS_MAX: u32 = 256;
const LINES_AHEAD: usize = 256;
/// How long peers have to take note that this node stops.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

/// What a peer asks for.
#[derive(Debug, Extensible)]
enum Request {
    /// Frames with lines come back.
    TaskLogs { task: TaskId, query: LogQuery },
    /// This many parts follow; one frame with the reply comes back.
    Snapshot {
        header: Vec<u8>,
        parts: u32,
        /// As in a message of consensus.
        #[added]
        to: u64,
        #[added]
        incarnation: u64,
    },
}

/// Which lines of a task are wanted.
#[derive(Clone, Debug, Extensible)]
pub(crate) struct LogQuery {
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) since: Option<Timestamp>,
    pub(crate) until: Option<Timestamp>,
    pub(crate) tail: Option<u64>,
    pub(crate) follow: bool,
}

impl LogQuery {
    pub(crate) fn options(&self) -> LogOptions {
        LogOptions {
            stdout: self.stdout,
            stderr: self.stderr,
            since: self.since,
            until: self.until,
            tail: self.tail.and_then(|tail| usize::try_from(tail).ok()),
            follow: self.follow,
        }
    }
}

#[derive(Extensible)]
struct WireLine {
    text: String,
    stderr: bool,
    time: Timestamp,
}

/// A node's QUIC endpoint.
#[derive(Clone)]
pub(crate) struct Bulk {
    endpoint: Endpoint,
    tls: Arc<TlsIdentity>,
    engine: Arc<Engine>,
    /// Present while this node is a manager.
    store: Arc<Mutex<Option<Store>>>,
}

impl Bulk {
    /// Listens on `addr`.
    pub(crate) fn listen(addr: SocketAddr, tls: Arc<TlsIdentity>, engine: Arc<Engine>) -> anyhow::Result<Self> {
        let config = QuicServerConfig::try_from(tls.server_config(ALPN)?)?;
        let mut config = ServerConfig::with_crypto(Arc::new(config));
        config.transport_config(transport());
        let endpoint = Endpoint::server(config, addr)
            .map_err(|error| anyhow::anyhow!("{addr}/udp cannot be listened on: {error}"))?;
        let bulk = Self { endpoint, tls, engine, store: Arc::default() };
        tokio::spawn(bulk.clone().accept());
        Ok(bulk)
    }

    /// Says which store takes snapshots; none while the node is a worker.
    pub(crate) fn serve_store(&self, store: Option<Store>) {
        *self.store.lock().expect("nobody panics while holding it") = store;
    }

    /// Ends all connections and lets go of the port, whoever still holds the endpoint.
    pub(crate) async fn close(&self) {
        self.endpoint.close(0u32.into(), b"the node stops");
        // Those who do not answer learn of it by their own limits.
        drop(tokio::time::timeout(CLOSE_LIMIT, self.endpoint.wait_idle()).await);
        let elsewhere = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| self.endpoint.rebind(socket));
        if let Err(error) = elsewhere {
            tracing::warn!(%error, "the port of bulk traffic is not let go of yet");
        }
    }

    async fn accept(self) {
        while let Some(incoming) = self.endpoint.accept().await {
            let bulk = self.clone();
            tokio::spawn(async move {
                let Ok(connection) = incoming.await else { return };
                let Some(peer) = peer_identity(&connection) else {
                    connection.close(1u32.into(), b"a node certificate is needed");
                    return;
                };
                while let Ok((send, recv)) = connection.accept_bi().await {
                    let bulk = bulk.clone();
                    tokio::spawn(async move {
                        if let Err(error) = bulk.answer(peer, send, recv).await {
                            tracing::debug!(peer = %peer.node(), %error, "a bulk request failed");
                        }
                    });
                }
            });
        }
    }

    async fn answer(&self, peer: PeerIdentity, mut send: SendStream, mut recv: RecvStream) -> anyhow::Result<()> {
        // Invariant: only managers ask for output or send snapshots.
        let valid = peer.is_valid_at(std::time::SystemTime::now());
        anyhow::ensure!(peer.role() == NodeRole::Manager && valid, "node {} is no manager", peer.node());
        let request: Request = encoding::decode(&read_frame(&mut recv).await?)?;
        match request {
            Request::TaskLogs { task, query } => self.send_logs(task, &query, &mut send).await?,
            Request::Snapshot { header, parts, to, incarnation } => {
                let store = self.store.lock().expect("nobody panics while holding it").clone();
                let store = store.ok_or_else(|| anyhow::anyhow!("this node is no manager"))?;
                let envelope = Envelope { to, incarnation };
                anyhow::ensure!(envelope.other_incarnation(&store).is_none(), "it is of another incarnation");
                let mut received = Vec::new();
                for _ in 0..parts {
                    received.push(Bytes::from(read_frame(&mut recv).await?));
                }
                let reply = store.handle_snapshot(envelope.addressee(&store), &header, received).await?;
                write_frame(&mut send, &reply).await?;
            }
        }
        send.finish()?;
        Ok(())
    }

    async fn send_logs(&self, task: TaskId, query: &LogQuery, send: &mut SendStream) -> anyhow::Result<()> {
        let Some(container) = find_container(&self.engine, task) else { return Ok(()) };
        let mut lines = self.engine.logs(&container, query.options())?;
        loop {
            let line = tokio::select! {
                line = lines.recv() => line,
                // Whoever asked has gone.
                _ = send.stopped() => return Ok(()),
            };
            let Some(line) = line else { return Ok(()) };
            let line = WireLine { text: line.text, stderr: line.stream == LogSource::Stderr, time: line.time };
            write_frame(send, &encoding::encode(&line)).await?;
        }
    }

    async fn connect(&self, addr: SocketAddr, name: &str) -> anyhow::Result<Connection> {
        let crypto = QuicClientConfig::try_from(self.tls.client_config(ALPN)?)?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(transport());
        Ok(self.endpoint.connect_with(config, addr, name)?.await?)
    }

    /// Reads a task's output from the node that has it.
    pub(crate) async fn task_logs(
        &self,
        node: &skep_api::Node,
        task: TaskId,
        query: LogQuery,
    ) -> anyhow::Result<mpsc::Receiver<LogLine>> {
        let addr: SocketAddr = SocketAddr::new(node.status.addr.parse()?, node.bulk_port);
        let connection = self.connect(addr, &skep_pki::ca::tls_name(node.id)).await?;
        let (mut send, mut recv) = connection.open_bi().await?;
        write_frame(&mut send, &encoding::encode(&Request::TaskLogs { task, query })).await?;
        send.finish()?;
        let (lines, stream) = mpsc::channel(LINES_AHEAD);
        tokio::spawn(async move {
            // The connection is kept as long as its stream is read.
            let _connection = connection;
            while let Ok(frame) = read_frame(&mut recv).await {
                let Ok(line) = encoding::decode::<WireLine>(&frame) else { return };
                let stream = if line.stderr { LogSource::Stderr } else { LogSource::Stdout };
                if lines.send(LogLine { text: line.text, stream, time: line.time }).await.is_err() {
                    return;
                }
            }
        });
        Ok(stream)
    }
}

/// The container of a task on this node.
pub(crate) fn find_container(engine: &Engine, task: TaskId) -> Option<String> {
    let label = task.to_string();
    let found = engine.list().into_iter().find(|container| container.config.labels.get(TASK_ID_LABEL) == Some(&label));
    found.map(|container| container.id)
}

impl BulkTransport for Bulk {
    fn send_snapshot<'a>(
        &'a self,
        addr: &'a str,
        envelope: Envelope,
        header: Vec<u8>,
        parts: Vec<Bytes>,
    ) -> BulkReply<'a> {
        Box::pin(
            async move { self.push_snapshot(addr, envelope, header, parts).await.map_err(|error| error.to_string()) },
        )
    }
}

impl Bulk {
    async fn push_snapshot(
        &self,
        addr: &str,
        Envelope { to, incarnation }: Envelope,
        header: Vec<u8>,
        parts: Vec<Bytes>,
    ) -> anyhow::Result<Vec<u8>> {
        let control: SocketAddr =
            tokio::net::lookup_host(addr).await?.next().ok_or_else(|| anyhow::anyhow!("no such host"))?;
        let addr = SocketAddr::new(control.ip(), crate::swarm::BULK_PORT);
        let connection = self.connect(addr, "swarm-manager").await?;
        let (mut send, mut recv) = connection.open_bi().await?;
        let request = Request::Snapshot { header, parts: u32::try_from(parts.len())?, to, incarnation };
        write_frame(&mut send, &encoding::encode(&request)).await?;
        for part in parts {
            write_frame(&mut send, &part).await?;
        }
        send.finish()?;
        read_frame(&mut recv).await
    }
}

fn transport() -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config.max_concurrent_bidi_streams(STREAMS_MAX.into());
    config.max_concurrent_uni_streams(0u32.into());
    config.max_idle_timeout(Some(IDLE_LIMIT.try_into().expect("a short time fits")));
    config.keep_alive_interval(Some(KEEPALIVE_EVERY));
    Arc::new(config)
}

fn peer_identity(connection: &Connection) -> Option<PeerIdentity> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().ok()?;
    PeerIdentity::from_certificate(chain.first()?).ok()
}

async fn write_frame(send: &mut SendStream, bytes: &[u8]) -> anyhow::Result<()> {
    send.write_all(&u32::try_from(bytes.len())?.to_be_bytes()).await?;
    send.write_all(bytes).await?;
    Ok(())
}

async fn read_frame(recv: &mut RecvStream) -> anyhow::Result<Vec<u8>> {
    let mut len = [0; 4];
    recv.read_exact(&mut len).await?;
    let len = usize::try_from(u32::from_be_bytes(len))?;
    anyhow::ensure!(len <= FRAME_LEN_MAX, "a frame of {len} bytes is too large");
    let mut bytes = vec![0; len];
    recv.read_exact(&mut bytes).await?;
    Ok(bytes)
}
