//! What connected workers cost a manager: many that only hold their session.

use std::sync::Arc;
use std::time::Duration;

use skep_api::grpc::node_ca_client::NodeCaClient;
use skep_api::grpc::{CertificateRequest, Heartbeat, Hello, ManagerMessage, WorkerMessage, worker_message};
use skep_api::{NodeDescription, encoding, session};
use skep_chaos_tests::Rig;
use skep_manager::transport::{Channels, channel};
use skep_pki::{PendingIdentity, TlsIdentity, pinned_client_config};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::kilobytes;
use crate::peer::{Maker, Peer};

const MANAGER: &str = "10.77.0.1:2377";
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// Long enough that the manager has given back what the joining took.
const SETTLE: Duration = Duration::from_secs(25);

pub(crate) fn workers() {
    const WORKERS: u32 = 500;
    let rig = Rig::swarm(2, 1);
    let manager = Peer::of(rig.host(1), Maker::Skep);
    let token = rig.host(1).ok(&["swarm", "join-token", "-q", "worker"]).trim().to_owned();
    rig.host(2).within_network(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let resident = async || {
                tokio::time::sleep(SETTLE).await;
                kilobytes(&manager.daemon_pids(), "Rss:")
            };
            // The first few bring in what is needed once.
            for number in 0..10 {
                tokio::spawn(hold(connect(number, join(&token).await).await));
            }
            let alone = resident().await;
            let mut joined = Vec::new();
            for _ in 0..WORKERS {
                joined.push(join(&token).await);
            }
            let before = resident().await;
            for (number, tls) in (10..).zip(joined) {
                tokio::spawn(hold(connect(number, tls).await));
            }
            let after = resident().await;
            let each = |from: f64, to: f64| (to - from) / f64::from(WORKERS);
            println!("{:<58} {:.1} kB", "manager, for each worker that has joined", each(alone, before));
            println!("{:<58} {:.1} kB", "manager, for each that is connected, besides", each(before, after));
            let nodes = manager.ask("/nodes").unwrap_or_default();
            let all = nodes.as_array().map_or(&[][..], Vec::as_slice);
            let ready = all.iter().filter(|node| node["Status"]["State"] == "ready").count();
            assert_eq!(ready as u32, WORKERS + 12, "all of them are there");
        });
    });
}

type Connection = TlsStream<TcpStream>;
type Session = (session::Incoming<Connection, ManagerMessage>, session::Outgoing<Connection>);

/// Beats, and takes what the manager says.
async fn hold((mut from_manager, mut to_manager): Session) {
    loop {
        send(&mut to_manager, worker_message::Kind::Heartbeat(Heartbeat {})).await;
        while let Ok(message) = tokio::time::timeout(BEAT_EVERY, from_manager.next()).await {
            message.expect("the session goes on").expect("the session goes on");
        }
    }
}

async fn send(to_manager: &mut session::Outgoing<Connection>, kind: worker_message::Kind) {
    to_manager.send(&WorkerMessage { kind: Some(kind) }).await.expect("the session is open");
}

/// A new node.
async fn join(token: &str) -> Arc<TlsIdentity> {
    let (config, _) = pinned_client_config(&[b"h2"]).expect("a configuration");
    let pending = PendingIdentity::generate().expect("a key");
    let request = CertificateRequest {
        csr_pem: pending.request_pem().expect("a request").into_bytes(),
        join_token: token.to_owned(),
        availability: String::new(),
    };
    let mut authority = NodeCaClient::new(channel(MANAGER, Arc::new(config)));
    let issued = authority.issue_certificate(request).await.expect("a certificate").into_inner();
    let text = |bytes| String::from_utf8(bytes).expect("PEM is text");
    let identity = pending.certified(&text(issued.certificate_pem), &text(issued.root_certificate_pem));
    TlsIdentity::new(identity.expect("an identity")).expect("a usable identity")
}

/// The session of a node.
async fn connect(number: u32, tls: Arc<TlsIdentity>) -> Session {
    let connection = Channels::new(tls).session(MANAGER).await.expect("a connection");
    let (from_manager, mut to_manager) = session::split(connection);
    let description = NodeDescription { hostname: format!("held{number}"), ..NodeDescription::default() };
    let hello = Hello { description: encoding::encode(&description), bulk_port: 7946 };
    send(&mut to_manager, worker_message::Kind::Hello(hello)).await;
    (from_manager, to_manager)
}
